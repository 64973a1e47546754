"""Questions about videos, answered by one of several strategies: for files of your own, or for a whole data set.

    python infer.py --video world                # a built-in video, its own question, the built-in policy
    python infer.py --video holiday.mp4 --question "When does the dog jump?" --options "at once" later never
    python infer.py --video holidays/ --question "When does the dog jump?" --out pages/      # every file, a page each
    accelerate launch infer.py --strategy divide-and-conquer --test_data world               # all test questions

| strategy           | source                   | what it does                                               |
|--------------------|--------------------------|------------------------------------------------------------|
| one-stage          | Zoom-Zero 5.5 (i)        | the coarse pass alone                                      |
| coarse-to-fine     | Zoom-Zero 4.1, 5.5 (ii)  | zoom on the spans of the coarse pass and answer again      |
| divide-and-conquer | Zoom-Zero 5.5 (iii), D.3 | a pass per window; zoom on the spans of the surest windows |
| ground-then-answer | LongVTG-R1, Table 3      | one model finds, the same or another answers from the clip |
| repeated-zoom      | the papers' future work  | look for spans inside the spans, until they stay           |
| agent              | VideoZoomer 3.1          | the model asks for clips, turn by turn, until it answers   |

What the papers leave open, and how it is here:

- A window is `window` frames at `fps` (256 at 1 per second: 256 s) and gets the whole budget of Eq. 3, or
  `window_budget`. The model sees a window as a video that starts at 0; what it claims is put back into the video's
  time. Windows have no frame in common, so what they share is the work around the model: one pass over the file decodes
  all of them, and they are answered together, `eval_batch` at a time.
- Confidence is the probability, among all tokens, of the token that carries the letter between <answer> and </answer>
  (tokenizers may fuse it with a bracket). A window without an answer has confidence 0. Without options, the confidence
  is that of the spans: the geometric mean of their tokens' probabilities.
- Without any usable span there is nothing to zoom into, and the coarse answer stands; ground-then-answer shows the
  whole video instead, because its answering model has not seen anything yet.
- The released Zoom-Zero code is `--released`: five spans; windows ranked by answer and spans together (here: the
  product of both confidences); the answer of a further pass over the whole video wins if it is surer; no answer becomes
  "C".
- Repeated zoom shows the spans widened by half their length at each end, so that a span can also move and grow. It
  stops when the new spans have an IoU of `stable` with the old ones, when none are found, or after `max_zooms`.

The questions of a data set are asked side by side, `eval_batch` looks in a pass, while the next ones' videos are
decoded; no answer depends on the others. Each finished question is one line of the result file, and running again does
only the rest. Questions about one video are answered by one process, which keeps decoded frames for the next question.
A question's seconds are those of decoding what it was shown, and its share of the passes. Processes are those of
`accelerate launch`, on a CPU of `torchrun --nproc_per_node 2 infer.py ...`.
"""

from __future__ import annotations

from harness import commands

if __name__ == "__main__":
    commands.begin("infer", __doc__, bare=True)  # the imports below take seconds

import argparse
import contextlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import config as configuration
import evaluate
import prompts
from annotations.rows import DataError, Sample
from annotations.samples import VIDEO_SUFFIXES, check_videos, load_samples
from config import Config, ConfigError, suiting_recipe
from engine.confidence import letter_probabilities, span_probability
from engine.flops import forward_flops, patch_grids
from engine.loading import patch_side
from harness import journal
from harness.asking import FRAME_BYTES, Agent, Request, Steps, side_by_side, whole_video, zoomed
from harness.closer import closer_view, widened
from harness.commands import Settings
from harness.folder import claimed, claimed_file
from harness.run import patient_accelerator, program, share, use_threads
from media.decode import VideoInfo, probe
from media.file import VideoError
from media.frames import FrameCache
from policy import ModelError, Video
from prompts import Spans
from report import ReportError, tables
from report.answer import answer_page, answer_record, answer_text, play_source
from report.results import from_file, priced_row, read_results, to_file
from rewards import interval_iou
from rollout import Group, View, visible_spans
from video import Budget, Clip, load_clips, plan_clip, to_video_time
from world import benchmark

log = logging.getLogger("zoomgrpo")
RELEASED = {"top": 5, "rank": "answer_and_spans", "compare_whole": True, "unparsable": "C"}


@dataclass
class Look:
    """One pass of the model over frames of the video: what was shown and what came back.

    `part` is the part of the video that was shown, None for all of it. `letters` are probabilities among all tokens,
    `confidence` is that of the answer or, without options, of the spans. `spans` are in the video's time, None if there
    were none to read. An agent's turns are looks too; `refusal` says why one of its calls showed nothing.
    """

    kind: str  # "coarse", "window", "closer", "zoom"; an agent's "glance" and "call"
    part: Spans | None
    clip: Clip
    answer: str | None
    letters: dict[str, float]
    confidence: float
    spans: Spans | None
    span_confidence: float
    text: str
    flops: float
    refusal: str = ""

    @property
    def visual_tokens(self) -> int:
        return sum(map(math.prod, patch_grids(self.clip, self.kind == "call"))) // 4


@dataclass
class Result:
    """The answer to a question, with all looks that led to it."""

    answer: str | None
    letters: dict[str, float]
    confidence: float
    spans: Spans | None
    looks: list[Look]

    @classmethod
    def of(cls, look: Look, spans: Spans | None, looks: Sequence[Look]) -> Result:
        """The answer of one of the looks, with these spans."""
        return cls(look.answer, look.letters, look.confidence, spans, list(looks))

    @property
    def visual_tokens(self) -> int:
        return sum(look.visual_tokens for look in self.looks)

    @property
    def frames(self) -> int:
        return sum(len(look.clip.times) for look in self.looks)

    @property
    def flops(self) -> float:
        return sum(look.flops for look in self.looks)


# ---------------------------------------------------------------- strategies


def one_stage(agent: Agent, sample: Sample, settings: Settings) -> Steps:
    """The coarse pass alone."""
    coarse = yield from look_once(coarse_request(agent, sample))
    return Result.of(coarse, coarse.spans, [coarse])


def coarse_to_fine(agent: Agent, sample: Sample, settings: Settings) -> Steps:
    """Zoom on the spans of the coarse pass, and answer again. Zoom-Zero section 4.1."""
    whole = coarse_request(agent, sample)
    coarse = yield from look_once(whole)
    spans = visible_spans(coarse.spans, whole.view.info.duration)
    if not spans:
        return Result.of(coarse, coarse.spans, [coarse])
    closer = yield from zoom(agent, whole, spans, coarse.text)
    return Result.of(closer, coarse.spans, [coarse, closer])


def divide_and_conquer(agent: Agent, sample: Sample, settings: Settings) -> Steps:
    """Ask every window, and zoom on the spans of the surest ones. Zoom-Zero section 5.5 and Appendix D.3."""
    info = probe(sample.video)
    parts = windows(info, agent.config, settings)
    requests = window_requests(agent, sample, info, parts, settings)
    looks = yield from look(requests, "window", parts)

    def sureness(look: Look) -> float:
        return look.confidence * (look.span_confidence if settings.rank == "answer_and_spans" else 1)

    ranked = sorted(looks, key=sureness, reverse=True)  # windows that are equally sure stay in order
    spans = sorted([span for look in ranked for span in look.spans or []][: settings.top])
    result = Result.of(ranked[0], spans or None, looks)
    if spans and sample.options:
        closer = yield from zoom(agent, requests[0], spans)
        result = Result.of(closer, spans, [*looks, closer])
    if settings.compare_whole and sample.options:
        whole = yield from look_once(coarse_request(agent, sample))
        looks = [*result.looks, whole]
        result = Result.of(whole if whole.confidence > result.confidence else result, spans or whole.spans, looks)
    return result


def ground_then_answer(agent: Agent, sample: Sample, settings: Settings, grounder: Agent | None = None) -> Steps:
    """One model finds the spans, the same or another answers from these alone. LongVTG-R1, Table 3."""
    whole = coarse_request(replace(grounder or agent, frames=agent.frames), sample)
    coarse = yield from look_once(whole)
    closer = yield from zoom(agent, whole, visible_spans(coarse.spans, whole.view.info.duration))
    return Result.of(closer, coarse.spans, [coarse, closer])


def repeated_zoom(agent: Agent, sample: Sample, settings: Settings) -> Steps:
    """Look for the spans again inside the spans, until they stay, and answer from the last ones."""
    whole = coarse_request(agent, sample)
    last = yield from look_once(whole)
    looks, duration = [last], whole.view.info.duration
    spans = visible_spans(last.spans, duration)
    for _ in range(settings.max_zooms):
        if not spans:
            break
        part = widened(spans, duration)
        closer = yield from look_once(part_request(agent, whole, part), "closer", part)
        looks.append(closer)
        found = visible_spans(closer.spans, duration)
        if not found:
            break
        stays = interval_iou(found, spans) >= settings.stable
        spans, last = found, closer
        if stays:
            break
    if spans and sample.options:
        last = yield from zoom(agent, whole, spans)
        looks.append(last)
    return Result.of(last, spans or last.spans, looks)


@torch.no_grad()
def play_episode(agent: Agent, sample: Sample, settings: Settings) -> Steps:
    """The model asks for clips until it answers; the result's spans are those of its clips. VideoZoomer section 3.1."""
    [group] = yield [whole_video(agent, sample)]
    [episode] = group.responses
    nothing = Clip(group.view.clip.frames[:0], [], group.view.clip.step)
    looks, kind, clip, part, refusal, past, new = [], "glance", group.view.clip, None, "", 0, len(group.prompt)
    for turn in episode.turns:
        letters = letter_probabilities(agent.model, turn, len(sample.options), agent.vocabulary)
        flops = forward_flops(agent.model, clip, new, len(turn.ids), past, kind == "call")
        sure = letters.get(turn.answer, 0.0)
        looks.append(Look(kind, part, clip, turn.answer, letters, sure, None, 0.0, turn.text, flops, refusal))
        if reply := turn.reply:
            past, new = past + new + len(turn.ids) - 1, len(turn.observation.prompt) + 1  # its last token comes first
            kind, clip, part = "call", reply.clip or nothing, [reply.call.span] if reply.call else None
            refusal = "" if reply.clip else reply.text
    return Result.of(looks[-1], episode.spans, looks)


Strategy = Callable[[Agent, Sample, Settings], Steps]  # they return a Result
STRATEGIES: dict[str, Strategy] = {
    "one-stage": one_stage,
    "coarse-to-fine": coarse_to_fine,
    "divide-and-conquer": divide_and_conquer,
    "ground-then-answer": ground_then_answer,
    "repeated-zoom": repeated_zoom,
    "agent": play_episode,
}
NEED_OPTIONS = ("coarse-to-fine", "ground-then-answer", "agent")  # they end with a letter


# ---------------------------------------------------------------- what is shown


def coarse_request(agent: Agent, sample: Sample) -> Request:
    """The coarse pass; a question without options asks for the spans of an event."""
    return whole_video(agent if sample.options else agent.about_events, sample)


def part_request(agent: Agent, whole: Request, part: Spans) -> Request:
    """A part of the video as if it were a video of its own, as close as a zoom."""

    def show() -> View:
        return closer_view(whole.view, part, agent.config, agent.frames)

    return replace(coarse_request(agent, whole.sample), show=show, alone=True)


def windows(info: VideoInfo, config: Config, settings: Settings) -> list[Spans]:
    """The parts of the video, one after the other, that have `settings.window` frames each (the last one: the rest)."""
    length = settings.window / min(config.fps, info.fps)  # seconds
    n = max(1, math.ceil((info.duration - 1e-6) / length))
    return [[(k * length, min((k + 1) * length, info.duration))] for k in range(n)]


def window_requests(
    agent: Agent, sample: Sample, info: VideoInfo, parts: Sequence[Spans], settings: Settings
) -> list[Request]:
    """A request for each part at the coarse pass' frame rate, each as a video of its own, decoded together. Raises
    VideoError.
    """
    config = agent.config
    tokens = settings.window_budget or config.budget
    budget = Budget(tokens, config.v_min, config.v_max, config.paired_frames, patch_side(config.model))
    plans = [plan_clip(info, part, config.fps, budget) for part in parts]

    @cache
    def views() -> list[View]:
        clips = load_clips(sample.video, plans, cache=agent.frames)
        return [View(sample, info, clip, Video.of(clip)) for clip in clips]

    asked = coarse_request(agent, sample)
    return [replace(asked, show=lambda k=k: views()[k], alone=True) for k in range(len(parts))]


# ---------------------------------------------------------------- what is asked


def look(requests: Sequence[Request], kind: str = "coarse", parts: Sequence[Spans | None] = ()) -> Steps:
    """Ask for reasoning, answer and spans about each, greedily; returns Looks. `parts`: what each shows, if not all."""
    groups = yield list(requests)
    return [
        written_look(request, group, kind, part)
        for request, group, part in zip(requests, groups, parts or [None] * len(groups), strict=True)
    ]


def look_once(request: Request, kind: str = "coarse", part: Spans | None = None) -> Steps:
    """One `look`."""
    [seen] = yield from look([request], kind, [part])
    return seen


@torch.no_grad()
def written_look(request: Request, group: Group, kind: str, part: Spans | None) -> Look:
    """What came back from a pass that writes."""
    agent, view, n_options = request.agent, request.view, len(request.sample.options)
    [response] = group.responses
    [turn] = response.turns
    answer = response.answer if n_options else None
    letters = letter_probabilities(agent.model, turn, n_options, agent.vocabulary) if n_options else {}
    spans_sure = span_probability(agent.model, turn)
    return Look(
        kind=kind,
        part=part,
        clip=view.clip,
        answer=answer,
        letters=letters,
        confidence=letters.get(answer, 0.0) if n_options else spans_sure,
        spans=to_video_time(response.spans, view.clip, view.info.duration) if part else response.spans,
        span_confidence=spans_sure,
        text=response.text,
        flops=forward_flops(agent.model, view.clip, len(group.prompt), len(response.ids)),
    )


def zoom(agent: Agent, whole: Request, spans: Spans, response: str = "") -> Steps:
    """Ask for the letter again, showing only these spans (none: the whole video), closer and at a higher frame rate;
    returns a Look.
    """
    think = prompts.parse_think(response) if agent.config.zoom_sees_think else None
    request = zoomed(agent, whole, spans, think)
    [seen] = yield [request]
    return Look(
        kind="zoom",
        part=spans or None,
        clip=seen.clip,
        answer=seen.answer,
        letters=seen.letters,
        confidence=seen.letters.get(seen.answer, 0.0),
        spans=None,
        span_confidence=0.0,
        text=seen.text,
        flops=forward_flops(agent.model, seen.clip, seen.n_prompt, seen.n_written),
    )


# ---------------------------------------------------------------- a data set


def answer_row(sample: Sample, result: Result | VideoError, seconds: float, settings: Settings) -> dict:
    """One question's row, as `priced_row` has it; with the "error" of an unreadable video (unanswered then) or None."""
    error = None
    if isinstance(result, VideoError):
        result, error = Result(None, {}, 0.0, None, []), str(result)
    return priced_row(sample, final_answer(result, sample, settings), result, seconds, error)


def final_answer(result: Result, sample: Sample, settings: Settings) -> str | None:
    """The result's answer, or what stands for none."""
    return result.answer or (settings.unparsable if sample.options else "") or None


def answer_all(
    agent: Agent,
    ask: Strategy,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    path: str | Path,
    made_with: dict,
    accelerator: Accelerator,
) -> list[dict]:
    """Answer the samples that the result file `path` does not have yet, or has as unreadable; all rows, on every
    process.

    `made_with` goes into each row; DataError if the file has rows that were made with something else or are about
    other questions. Split over processes, which all append to the one file.
    """
    path = Path(path)
    if accelerator.is_main_process:
        journal.begin(path)
    accelerator.wait_for_everyone()
    done = {id for id, row in stored(path, samples, made_with).items() if not row["error"]}
    rest = [sample for sample in samples if sample.id not in done]  # what could not be read may be readable now
    accelerator.wait_for_everyone()  # everybody has read the file before anybody adds to it
    agent = replace(agent, frames=FrameCache(FRAME_BYTES))  # so that seconds do not depend on earlier calls
    label = f"{path.name}: {len(done)} done, {len(rest)} to do"
    local_samples = [rest[k] for k in share(rest, accelerator)]
    questions = ((sample, ask(agent, sample, settings)) for sample in local_samples)
    quiet = None if accelerator.is_main_process else True
    with tqdm(total=len(local_samples), desc=label, unit="question", disable=quiet) as bar:
        for sample, result, seconds in side_by_side(questions, agent.config.eval_batch, accelerator.autocast):
            row = answer_row(sample, result, seconds, settings)
            journal.append(path, {**to_file(row), **words_of(sample), "made_with": made_with})
            bar.update()
    accelerator.wait_for_everyone()
    rows = stored(path, samples, made_with)
    return [rows[sample.id] for sample in samples]


def words_of(sample: Sample) -> dict:
    """What is asked about the video."""
    return {"question": sample.question, "options": list(sample.options)}


def stored(path: Path, samples: Sequence[Sample], made_with: dict) -> dict[str, dict]:
    """The rows of a result file by question, the last one of each; DataError if they are not about these samples, in
    the same words, made in this way.
    """
    if not path.exists() or not path.stat().st_size:
        return {}
    try:
        read_results(path, list(samples))  # checks ids, videos, answers, spans
    except DataError as error:
        raise DataError(f"{error} The file is gone on with; give another --out to begin one") from None
    rows = journal.read(path)
    journal.check_made_with(rows, made_with)
    known = {sample.id: words_of(sample) for sample in samples}
    for row in rows:
        for name, now in known[str(row.fields["id"])].items():
            if (then := row.fields.get(name, now)) != now:
                raise row.error(name, f"was {then!r} and is {now!r} now; give another --out")
    return {str(row.fields["id"]): from_file(row.fields) for row in rows}


# ---------------------------------------------------------------- command line


def parse_infer(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings, Config, Config | None]:
    """What is asked, the strategy's settings, and how the answering and the grounding model (if it is another one) are
    shown videos: each by the recipe that suits it, unless --config names one. Raises ConfigError."""
    options, config = configuration.parse_for_model(commands.extra("infer", __doc__), arguments, program="infer")
    grounding = None
    if options.ground_model:
        recipe = suiting_recipe(options.ground_model)
        _, grounding = configuration.parse_with(commands.extra("infer", __doc__), arguments, lambda _: recipe, "infer")
        grounding.model = options.ground_model
    changed = {f.name: getattr(options, f.name) for f in fields(Settings) if getattr(options, f.name) is not None}
    settings = Settings(**{**(RELEASED if options.released else {}), **changed})
    check_options(options, settings)
    return options, settings, config, grounding


def check_options(options: argparse.Namespace, settings: Settings) -> None:
    """Raise ConfigError for options that cannot work together."""
    for name in ("window", "top", "max_zooms"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(settings, name)}")
    if settings.window_budget < 0 or not 0 < settings.stable <= 1:
        raise ConfigError("window_budget must not be negative, and stable is above 0 and at most 1")
    if settings.unparsable and settings.unparsable not in set(prompts.LETTERS):
        raise ConfigError(f"unparsable is one capital letter, not {settings.unparsable!r}")
    if options.video is None and (options.question or options.options or options.embed):
        raise ConfigError("--question, --options and --embed are about a --video of your own; name its file")
    if options.video not in (None, "world") and not (options.question or "").strip():
        raise ConfigError('--video needs a --question "..."')
    if any(not option.strip() for option in options.options):
        raise ConfigError("--options: one of them is empty")
    for name, words in (("question", options.question or ""), ("options", "\n".join(options.options))):
        if found := prompts.control(words):
            raise ConfigError(f"--{name} {found}; leave it out")
    if options.ground_model and options.strategy != "ground-then-answer":
        raise ConfigError("--ground_model is for --strategy ground-then-answer")


def check_question(strategy: str, config: Config, options: Sequence[str], where: str) -> None:
    """Raise ConfigError for a question without options where letters are needed, and for more options than letters."""
    if strategy not in STRATEGIES:
        raise ConfigError(f"{where}: there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
    if not options and strategy in NEED_OPTIONS:
        raise ConfigError(f"{where}: {strategy} ends with the letter of an option; give --options, or use one-stage")
    if strategy != "agent" and config.multi_turn:
        raise ConfigError(f"{where}: {config.template} is the template of --strategy agent, not of {strategy}")
    if strategy == "agent" and not config.multi_turn:
        raise ConfigError(
            f"{where}: agent needs a template of several turns, {' or '.join(prompts.multi_turn_templates())}, not "
            f"{config.template}; give --config recipes/videozoomer_rl.yaml, or the config.yaml of the model's run"
        )
    if not options and prompts.TEMPLATES[config.template].options_only:
        raise ConfigError(
            f"{where}: the built-in policy answers by letters only; give --options, such as "
            f"{' '.join(benchmark.COUNTS)} or {' '.join(benchmark.PATTERNS)}"
        )
    if len(options) > len(prompts.LETTERS):
        raise ConfigError(f"{where}: {len(options)} options, but only {len(prompts.LETTERS)} letters")


def load_agent(config: Config, device: torch.device) -> Agent:
    """The configured checkpoint, ready to be asked about videos. Raises ModelError naming what it lacks."""
    return Agent(*evaluate.load_policy(config, device), config)


def prepare(strategy: str, config: Config, grounding: Config | None, device: torch.device) -> tuple[Strategy, Agent]:
    """The strategy as a function, and the model that answers."""
    ask = STRATEGIES[strategy]
    if grounding:
        ask = partial(ground_then_answer, grounder=load_agent(grounding, device))
    return ask, load_agent(config, device)


def own_questions(options: argparse.Namespace, config: Config) -> list[tuple[Sample, Path]]:
    """What is asked about --video, and the page of each answer: one for a file or for `world`, a built-in video with
    its own question; one for every video file of a folder. Raises ConfigError, VideoError.
    """
    folder = Path(options.video)
    if options.video == "world":
        [own, *_] = load_samples("world", "test", replace(config, world_test_videos=1))
        options.question = options.question or own.question
        options.options = options.options or list(own.options)
        return [(own_sample(own.video, options), own_page(options, own.video))]
    if not folder.is_dir():
        return [(own_sample(options.video, options), own_page(options, options.video))]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise ConfigError(f"--video {folder}: no video files ({', '.join(VIDEO_SUFFIXES)}) in this folder")
    out = Path(options.out or f"runs/infer/{folder.resolve().name}")
    if out.suffix:
        raise ConfigError(f"--out {out}: the pages of a folder of videos go to a folder")
    return [(own_sample(str(file), options), out / f"{file.relative_to(folder)}.html") for file in files]


def own_page(options: argparse.Namespace, video: str) -> Path:
    """The page of the answer about one file. Raises ConfigError for a name that is none of a page."""
    page = Path(options.out or f"{Path(video).stem}.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {page}: the page's name ends with .html")
    return page


def own_sample(video: str, options: argparse.Namespace) -> Sample:
    """The question about a file, as a sample."""
    return Sample("own", video, options.question, tuple(options.options), None, (), None)


def own_videos(options: argparse.Namespace, settings: Settings, config: Config, grounding: Config | None) -> None:
    """Answer one question about one file, or about every file of a folder: print each answer, write its page.

    A file of a folder that cannot be read is named, and the others are answered.
    """
    questions = own_questions(options, config)
    strategy = options.strategy or ("coarse-to-fine" if options.options else "one-stage")
    check_question(strategy, config, options.options, "question")
    if len(questions) == 1:  # before the model is loaded
        probe(questions[0][0].video)
        play_source(questions[0][0].video, questions[0][1], options.embed)
    with claimed_pages([page for _, page in questions]):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ask, agent = prepare(strategy, config, grounding, device)
        asking = (((asked, page), ask(agent, asked, settings)) for asked, page in questions)
        for (asked, page), result, _ in side_by_side(asking, config.eval_batch):
            if isinstance(result, VideoError):
                if len(questions) == 1:
                    raise result
                log.warning("no answer: %s", result)
                continue
            info = probe(asked.video)
            asked = replace(asked, duration=info.duration)
            answer = final_answer(result, asked, settings)
            if asked.video != options.video:
                print(f"video       {asked.video}\nquestion    {asked.question}")
            print(answer_text(result, answer, options.options))
            source = play_source(asked.video, page, options.embed)
            answer_page(answer_record(result, answer, asked, strategy, info.begin), page, source)
            print(f"page        {page}")


def claimed_pages(pages: Sequence[Path]) -> contextlib.AbstractContextManager[None]:
    """Within, no other program writes the page, or pages into their folder. Raises TrainingError."""
    if len(pages) == 1:
        return claimed_file(pages[0], None)
    return claimed(os.path.commonpath([page.parent for page in pages]), None)


def whole_data_set(options: argparse.Namespace, settings: Settings, config: Config, grounding: Config | None) -> None:
    """Answer all questions of a data set that are not answered yet, and print scores and cost."""
    strategy = options.strategy or "coarse-to-fine"
    if not config.test_data:
        raise ConfigError("nothing to answer: give --video and --question, or --test_data")
    accelerator = patient_accelerator(config)
    with accelerator.main_process_first():
        samples = load_samples(config.test_data, "test", config)
    for number, one in enumerate(samples, 1):
        check_question(strategy, config, one.options, f"{config.test_data}: row {number} ({one.id})")
    samples = check_videos(samples, options.skip_missing)
    out = Path(options.out or f"runs/infer/{strategy}.jsonl")
    same = made_with(strategy, options.ground_model, settings, config)
    with claimed_file(out, accelerator):
        ask, agent = prepare(strategy, config, grounding, accelerator.device)
        rows = answer_all(agent, ask, samples, settings, path=out, made_with=same, accelerator=accelerator)
    if accelerator.is_main_process:
        print(tables.describe({strategy: rows}, config.data_format))
        print(f"\n{tables.cost_text(rows, strategy)}")
        print(f"results in {out}; evaluate.py --results compares them and draws them")


def made_with(strategy: str, ground_model: str | None, settings: Settings, config: Config) -> dict:
    """What rows of a result file must have in common."""
    return {
        "strategy": strategy,
        "model": config.model,
        "ground_model": ground_model,
        **asdict(settings),
        **configuration.decisive(config),
    }


def main(arguments: list[str] | None = None) -> None:
    options, settings, config, grounding = parse_infer(arguments)
    disable_progress_bar()  # of loading weights
    use_threads(config)
    do = whole_data_set if options.video is None else own_videos
    do(options, settings, config, grounding)


if __name__ == "__main__":
    program(main, DataError, ModelError, VideoError, ReportError)
