{  // a scope of its own
// Filters: a row has the words of the filters that it passes.
const rows = [...document.querySelectorAll("table.results tbody tr")];
const filters = [...document.querySelectorAll("[data-filter]")];
for (const button of filters) {
  button.addEventListener("click", () => {
    for (const other of filters) other.setAttribute("aria-pressed", String(other === button));
    const word = button.dataset.filter;
    for (const row of rows) row.hidden = word !== "all" && !row.dataset.words.split(" ").includes(word);
  });
}
// A row that is opened gets a player, and its video's frames, of which those of the evidence are marked.
const open = details => {
  const row = details.closest("tr"), template = document.getElementById("video-" + details.dataset.video);
  if (details.querySelector("video")) return details.querySelector("video");
  const video = document.createElement("video");
  Object.assign(video, {controls: true, muted: true, playsInline: true, preload: "metadata"});
  video.src = template.dataset.source;
  const missing = document.createElement("p");
  Object.assign(missing, {className: "muted", hidden: true});
  missing.textContent = "This browser cannot play the file: it was moved, or it has an unknown codec.";
  video.addEventListener("error", () => { missing.hidden = false; });
  details.append(video, missing, template.content.cloneNode(true));
  const truth = [...row.querySelectorAll(".true")].map(span => [Number(span.dataset.start), Number(span.dataset.end)]);
  for (const figure of details.querySelectorAll("figure")) {
    const time = Number(figure.dataset.time);
    if (truth.some(([start, end]) => start <= time && time < end)) figure.className = "evidence";
  }
  return video;
};
for (const details of document.querySelectorAll("details[data-video]"))
  details.addEventListener("toggle", () => { if (details.open) open(details); });
// A click on a span plays it, a click on a frame shows its moment.
document.addEventListener("click", event => {
  const span = event.target.closest("[data-start]"), frame = event.target.closest("[data-time]");
  const details = event.target.closest("tr")?.querySelector("details[data-video]");
  if (!details || !(span || frame)) return;
  const video = open(details), begin = Number(document.getElementById("video-" + details.dataset.video).dataset.begin);
  details.open = true;
  video.currentTime = begin + Number((span || frame).dataset[span ? "start" : "time"]);
  video.ontimeupdate = span ? () => {
    if (video.currentTime < begin + Number(span.dataset.end)) return;
    video.pause();
    video.ontimeupdate = null;
  } : null;
  if (span) video.play().catch(() => {}); else video.pause();
});
}
