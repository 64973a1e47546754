const video = document.querySelector("video"), length = Number(video.dataset.duration);
const begin = Number(video.dataset.begin);  // what the player's clock shows at the first frame
const now = () => video.currentTime - begin;
const tracks = [...document.querySelectorAll(".track")], buttons = [...document.querySelectorAll(".jumps button")];
const heads = tracks.map(track => {
  const head = document.createElement("div");
  head.className = "head";
  return track.appendChild(head);
});
let end = null;
const seek = (time, until) => {
  video.pause();
  video.currentTime = begin + time;
  end = until;
  if (until !== null) video.play().catch(() => {});
};
const show = () => {
  for (const head of heads) head.style.left = 100 * Math.max(0, Math.min(1, now() / length)) + "%";
  for (const button of buttons) button.classList.toggle("playing",
    now() >= Number(button.dataset.start) && now() < Number(button.dataset.end));
};
document.addEventListener("click", event => {
  const span = event.target.closest("[data-start]"), frame = event.target.closest("[data-time]");
  const track = event.target.closest(".track");
  if (span) seek(Number(span.dataset.start), Number(span.dataset.end));
  else if (frame) seek(Number(frame.dataset.time), null);
  else if (track) {
    const box = track.getBoundingClientRect();
    seek(length * (event.clientX - box.left) / box.width, null);
  }
});
video.addEventListener("timeupdate", () => {
  if (end !== null && now() >= end) { video.pause(); end = null; }
  show();
});
video.addEventListener("seeked", show);
video.addEventListener("error", () => { document.querySelector(".refused").hidden = false; });
show();
