"""The arithmetic of the benchmarks, and that the engines compared compute the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks import engine, gpu, gpu_checks, gpu_runs, longvtg, main_job, memory, zoomer
from benchmarks.engine import Cost, Ours
from benchmarks.ledger import Ledger
from benchmarks.memory import Parameters
from config import Config, parse
from report.results import write_results
from video import Budget, VideoInfo, plan_clip

# ---------------------------------------------------------------- memory.py


@pytest.mark.parametrize("name", ["7b", "3b", "20m", "tiny"])
def test_parameters_are_those_of_a_model(name):
    config = memory.shape(name)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    n = Parameters.of(config)
    language = model.model.language_model
    assert n.total == count(model)
    assert n.vision == count(model.model.visual)
    assert n.layer == count(language.layers[0])
    assert n.layers == count(language.layers) + count(language.norm)
    assert n.embedding == count(model.get_input_embeddings())
    assert n.head == (0 if config.tie_word_embeddings else count(model.lm_head))


def test_released_sizes():
    """What the released checkpoints' files say."""
    assert Parameters.of(memory.shape("7b")).total == 8_292_166_656
    assert Parameters.of(memory.shape("3b")).total == 3_754_622_976
    assert 19e6 < Parameters.of(memory.shape("20m")).total < 21e6


def test_cache_per_token():
    assert memory.cache_bytes_per_token(memory.shape("7b")) == 56 * 1024  # 28 layers, 4 heads of 128, keys and values
    assert memory.cache_bytes_per_token(memory.shape("3b")) == 36 * 1024


def test_memory_of_another_architecture_is_refused(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--model", str(memory.ROOT / "checkpoints" / "tiny")])
    assert "is of qwen3_vl: only the parts of Qwen2.5-VL" in capsys.readouterr().err


@pytest.mark.parametrize("paired", [False, True])
def test_no_clip_has_more_visual_tokens(paired):
    recipe = Config(paired_frames=paired)
    most = memory.visual_tokens(recipe, recipe.budget, recipe.v_max)
    found = []
    for seconds in [*range(1, 60), 100, 333, 600, 3600]:
        info = VideoInfo("v.mp4", float(seconds), 25.0, 1280, 720)
        plan = plan_clip(info, None, 1.0, Budget(recipe.budget, recipe.v_min, recipe.v_max, paired))
        found.append((len(plan.times) + 1) // 2 * (plan.height // 28) * (plan.width // 28))
    assert 0.9 * most < max(found) <= most


def test_a_phase_takes_the_sum_of_its_parts():
    found = [memory.Part("a", 1, memory.PHASES), memory.Part("b", 10, ("zoom",)), memory.Part("c", 100, ("KL", "zoom"))]
    assert memory.totals(found) == dict.fromkeys(memory.PHASES, 1) | {"zoom": 111, "KL": 101}
    assert memory.table(found).splitlines()[-1].split("|")[1].strip() == "sum"


def named(found: list[memory.Part]) -> dict[str, int]:
    return {part.name: part.bytes for part in found}


def test_weights_by_number_of_devices():
    model, recipe = memory.shape("7b"), Config(prompts_per_step=64)
    n = Parameters.of(model).total
    one, ddp, fsdp = (named(memory.parts(model, recipe, *how)) for how in [(1, False), (8, False), (8, True)])
    for name, each in {"weights": 4, "AdamW's two moments": 8, "gradients": 4}.items():
        name = f"policy: {name}, float32"
        assert one[name] == ddp[name] == each * n and fsdp[name] == each * n // 8
    assert one["reference: weights, 16 bits"] == fsdp["reference: weights, 16 bits"] == 2 * n
    streamed = named(memory.parts(model, replace(recipe, reference_device="cpu")))
    layer = Parameters.of(model).layer
    assert streamed["reference: a layer, copied from the CPU"] == 2 * layer
    assert streamed["reference: weights, 16 bits"] == 2 * (n - 28 * layer)
    frozen = named(memory.parts(model, Config(train_vision=False)))
    assert frozen["policy: gradients, float32"] == 4 * (n - Parameters.of(model).vision)


@pytest.mark.parametrize("vision", [False, True])
def test_lora_holds_one_model_in_half_precision_and_trains_adapters_alone(vision):
    model, recipe = memory.shape("20m"), Config(lora_rank=16, train_vision=vision)
    found = named(memory.parts(model, recipe))
    with torch.device("meta"):
        tower = Qwen2_5_VLForConditionalGeneration(model).model.visual
    linear = [layer for layer in tower.modules() if isinstance(layer, torch.nn.Linear)]
    trained = 720_896 + vision * 16 * sum(layer.in_features + layer.out_features for layer in linear)
    assert memory.adapters(model, recipe) == trained  # as peft makes them
    assert found["policy: weights, 16 bits"] == 2 * Parameters.of(model).total
    assert found["adapters: weights and AdamW's two moments, float32"] == 12 * trained
    assert not any(name.startswith("reference:") for name in found)
    assert ("update: activations kept by the vision tower" in found) == vision


def test_adapters_of_the_tower_keep_what_they_take():
    """Without recomputation: per patch and block, the MLP's inner activations once and its other inputs four times."""
    model, recipe = memory.shape("20m"), Config(gradient_checkpointing=False)
    whole, low_rank = (
        named(memory.parts(model, replace(recipe, lora_rank=rank)))["update: activations kept by the vision tower"]
        for rank in (0, 16)
    )
    patches = 4 * memory.visual_tokens(recipe, recipe.budget, recipe.v_max)
    assert low_rank - whole == patches * 4 * 2 * (428 + 4 * 160)


def test_moments_in_8_bits_take_two_bytes_and_their_scales():
    model, recipe = memory.shape("20m"), Config(optimizer="adamw8bit")
    moments = named(memory.parts(model, recipe))["policy: AdamW's two moments, 8 bits"]
    assert moments == pytest.approx((2 + 2 * 4 / 256) * Parameters.of(model).total)


def test_a_machine_is_given_the_least_sacrifice_that_fits():
    """In the order of binary numbers: all that leaves the training as it is, before the least that does not."""
    letters = [used for used, _ in memory.savings("all weights")]
    assert letters[:5] == ["", "a", "b", "ab", "c"] and letters[-1] == "abcdef" and len(letters) == 64
    assert [used for used, _ in memory.savings("LoRA")][:9] == ["", "a", "c", "ac", "d", "ad", "cd", "acd", "e"]
    assert len(list(memory.savings("LoRA"))) == 16  # its reference is nowhere else
    changed = dict(memory.savings("all weights"))["be"]
    assert (changed.reference_device, changed.budget, changed.group_size) == ("cpu", 4096, 8)


def test_the_documents_table_of_what_fits_where_is_the_commands():
    text = (memory.ROOT / "docs" / "training.md").read_text()
    assert memory.fits_table() in text and memory.legend() in " ".join(text.split())


def test_caches_and_activations_follow_the_recipe():
    model, recipe = memory.shape("7b"), Config()
    found = named(memory.parts(model, recipe))
    prompt = memory.visual_tokens(recipe, recipe.budget, recipe.v_max) + memory.TEXT_TOKENS
    assert found["rollout: prompts' keys and values"] == 8 * prompt * 56 * 1024
    assert found["rollout: responses' keys and values"] == 8 * 8 * 512 * 56 * 1024
    row = prompt + 8 * 512
    assert found["update: activations kept by the language model"] == 28 * row * 3584 * 4
    twice = named(memory.parts(model, Config(prompts_per_pass=2)))["update: activations kept by the language model"]
    assert twice == 2 * 28 * row * 3584 * 4


def test_seven_billion_need_sharding(capsys):
    memory.main(["--model", "7b"])
    assert "does not fit into 139 GiB" in capsys.readouterr().out
    memory.main(["--model", "7b", "--gpus", "8", "--fsdp"])
    out = capsys.readouterr().out
    assert "; fits into 139 GiB" in out and "CPU" not in out
    memory.main(["--model", "7b", "--gpus", "8", "--fsdp", "--reference_device", "cpu"])
    # A layer has 233,057,792 parameters: 445 MiB in 16 bits, for which 512 are pinned.
    assert "The reference's layers take 14.0 GiB of the CPU's memory per process." in capsys.readouterr().out


def allocated(job) -> tuple[int, int]:
    """Bytes that torch has at most allocated during a job, and at its end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = job()
    del result
    held = engine.held_bytes(profiler)
    return max(held), held[-1]


def test_an_update_takes_what_is_planned():
    """In float32, where the reference's pass and the projection's copies are the same on every device."""
    _, ours = engine.engines()
    problem = engine.make_problem(ours.model.config, 512, group=4, length=32)
    states = ours.reference_states(problem)
    ours.backward(problem, states)  # gradients are there in all passes but the first

    text = len(problem.prompts[0]) - 512
    recipe = Config(budget=1024, v_min=4, v_max=64, group_size=4, max_tokens=32, mixed_precision="no")
    found = named(memory.parts(ours.model.config, recipe))
    inputs = found["update: activations kept by the language model"]
    inputs -= 4 * (memory.TEXT_TOKENS - text) * 448 * 4
    kept = inputs + found["update: activations kept by the vision tower"]
    _, held = allocated(lambda: Ours.hidden(ours.model, problem, slice(0, 1)))
    assert held == pytest.approx(kept, rel=0.1)

    most, _ = allocated(lambda: ours.reference_states(problem))
    assert most == pytest.approx(found["~ update: a layer of the reference at work"], rel=0.3)
    most, _ = allocated(lambda: ours.backward(problem, states))
    assert most == pytest.approx(kept + found["~ update: a layer and its gradients"], rel=0.3)


# ---------------------------------------------------------------- engine.py


def test_naive_and_ours_compute_the_same():
    found = engine.differences(*engine.engines("tiny"), visual=64, group=3, length=6, batch=3, per_pass=2)
    assert found.pop("greedy tokens") == 0
    assert max(found.values()) < 1e-4


def test_both_take_the_main_job_s_sizes():
    """Prompts in one pass, clips of the zoom pass in batches, other frames there than in the prompt."""
    naive, ours = engine.engines("tiny", checkpoint=False)
    sizes = engine.MAIN_JOB | {"batch": 3, "group": 2, "length": 3, "zoom_batch": 4}
    problem = engine.make_problem(ours.model.config, **sizes)
    assert [len(part) for part in problem.zoom_passes()] == [4, 2]
    assert {prompt.videos[0].n_tokens for prompt in problem.zooms} == {96}
    losses = [e.update(problem, e.reference_states(problem)) for e in (naive, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (naive.zoom(problem) - ours.zoom(problem)).abs().max() < 1e-4


def test_the_vision_tower_is_compared_on_whole_and_on_cut_windows():
    _, ours = engine.engines()
    lines = engine.windows(ours.model.model.visual, [(64, (16, 16)), (36, (12, 12))], repeats=1)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:2] for row in cells] == [["64", "4"], ["36", "4"]]
    assert all(float(row[-1]) < 1e-4 for row in cells)


def test_operations_and_traffic():
    """Against figures computed elsewhere: 8,192 visual tokens, 8 responses of 512 tokens, TFLOP per prompt."""
    model = memory.shape("7b")
    vision, prefill = engine.vision_flops(model, 8192) / 1e12, engine.language_flops(model, 8192) / 1e12
    together = engine.language_flops(model, 8192, 8, 512) / 1e12
    alone = engine.language_flops(model, 8192, 1, 512) / 1e12
    assert [round(x) for x in (vision, prefill, together, 4 * together)] == [43, 120, 192, 769]
    assert 8 * (vision + prefill) == pytest.approx(1305, rel=2e-3)
    assert 8 * (vision + alone) == pytest.approx(1377, rel=2e-3)
    assert 8 * (vision + 4 * alone) == pytest.approx(4481, rel=2e-3)
    least = engine.limits(model, 8, 8192, 8, 512, 790e12, 4.3e12)
    assert least["decode"] / 512 == pytest.approx(4.4e-3, rel=0.01)
    assert least["zoom"] == pytest.approx(8 * 1.65, rel=0.01)
    assert least["update"] == pytest.approx(4 * least["reference"])


def test_ratios_are_medians_over_repeats():
    def step(seconds: float, memory: int) -> dict[str, Cost]:
        return {name: Cost(seconds, memory) for name in engine.PHASES}

    runs = [(step(4, 300), step(1, 100)), (step(9, 200), step(3, 100)), (step(10, 800), step(2, 100))]
    lines, ratios = engine.comparison(runs, "naive", engine.ALONE + engine.WHOLE)
    assert ratios["update"] == ratios["step"] == (4, 3)  # of 4, 3, 5 and of 3, 2, 8
    assert ratios["step; naive without zoom"] == (3, 3)  # three phases of four
    assert "| step | 36.00 | 8.00 | 4.00 | 0 | 0 | 3.00 |" in lines


def test_a_step_in_half_precision_with_several_prompts():
    lines = engine.exact_shape("tiny", "cpu", prompts=2, visual=64, group=2, length=4)
    phases = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert phases == ["phase", "---", *engine.PHASES, "step"]


# ---------------------------------------------------------------- zoomer.py


def finished(seed: int) -> dict:
    """A run that makes more calls with every ten steps, but on coarse questions fewer in the end."""

    def evaluation(accuracy: float, coarse: float) -> dict:
        kinds = {kind: {"accuracy": accuracy, "calls": coarse if kind == "coarse" else 1.0} for kind in zoomer.KINDS}
        return {"all": {"accuracy": accuracy, "format": accuracy, "frames": 20.0 + seed}, "by_kind": kinds}

    before, after = evaluation(0.5, 1.0), evaluation(0.75, 0.25 * seed)
    return {"before": before, "after": after, "curves": {"episode/calls": [0.45, 1.0, 1.45]}}


def test_zoomer_has_a_line_per_variant_with_the_means_of_its_runs(tmp_path):
    ledger = Ledger(tmp_path / "rows.jsonl", zoomer.key)
    for name, seed in (("tool-0.5", 0), ("tool-0.5", 1), ("cold", 2)):
        ledger.add(name, seed, "started")
        ledger.add(name, seed, "ended", **finished(seed))
    ledger.add("tool-0", 1, "started")
    ledger.add("tool-0", 1, "ended", **finished(3))
    ledger.add("agent", 0, "started")
    ledger.add("agent", 0, "ended", **dict.fromkeys(("accuracy", "coarse", "others", "frames", "visual tokens"), 0.5))
    text = zoomer.report(ledger, "x", tmp_path)
    assert "Runs started 5, ended 5, failed 0;" in text and (tmp_path / "zoomer.png").stat().st_size > 1000
    lines = text.splitlines()
    before, after, *kinds, form, frames = ("0.500 ± 0.000", *["0.750 ± 0.000"] * 6, "20.500 ± 0.707")
    assert f"| R_tool 0.5 (2) | {' | '.join([before, after, *kinds, form, frames])} |" in lines
    [cold] = [line for line in lines if line.startswith("| R_tool 0.5, without cold start (1) |")]
    assert cold.endswith("| 22.000 ± 0.000 |")
    [calls] = [line for line in lines if line.startswith("| R_tool 0.5 |")]
    cells = [cell.split(" ± ")[0].strip() for cell in calls.split("|")[2:-1]]
    assert list(map(float, cells)) == [0.45, 1.45, 1, 1, 1, 1, 0.125, 1, 1, 1]
    paired = "1 | 0.000 ± 0.000 | 1.000 | 0 | 0.000 ± 0.000 | -0.500 ± 0.000 |"  # of seed 1 alone
    assert [line for line in lines if " minus " in line] == [f"| R_tool 0.5 minus R_tool 0 | {paired}"]
    assert "| agent (1) | 0.500 ± 0.000 |" in text and "R_tool 1" not in text


@pytest.mark.parametrize("name", zoomer.VARIANTS)
def test_options_of_zoomers_variants_are_those_of_training(name):
    start, options = zoomer.key(name)
    assert parse([*zoomer.RECIPE[:2], *options], program="train").steps == 40
    shared = zoomer.key("tool-0.5")[0]
    assert (start == shared) == (name not in ("exemplars", "cold"))  # these begin with other weights


def test_a_strategy_is_judged_by_kind_and_cost():
    samples = [SimpleNamespace(kind=kind, answer="A") for kind in (*zoomer.KINDS, "coarse")]
    answers = iter("AABBB")

    def ask(agent, sample):
        yield from ()  # it looks at nothing
        return SimpleNamespace(answer=next(answers), frames=agent.frames, visual_tokens=40)

    agent = SimpleNamespace(config=SimpleNamespace(eval_batch=2), frames=4)
    found = zoomer.asked(agent, ask, samples)
    expected = {"accuracy": 2 / 5, "coarse": 1 / 2, "others": 1 / 3, "frames": 4, "visual tokens": 40}
    assert found == pytest.approx(expected)


# ---------------------------------------------------------------- longvtg.py


@pytest.mark.parametrize("name", [*longvtg.VARIANTS, *longvtg.STARTS])
def test_options_of_longvtgs_variants_are_those_of_training(name):
    config = parse(longvtg.options_of(name), program="train")
    late = name.startswith("late-")
    assert config.model.endswith("late-start" if late else "checkpoints/tiny") and config.world_test_videos == 40


def test_longvtg_asks_as_much_of_a_run_as_its_tables_show(tmp_path, monkeypatch):
    commands = []

    def ran(command, **_):
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        if command[1] == "evaluate.py":
            out.mkdir(parents=True, exist_ok=True)
            (out / "evaluation.json").write_text(json.dumps({"policy": {"all": {"mIoU": 0.5}}}))
        else:
            assert not out.exists(), "answers of an interrupted run are not gone on with"
            out.write_text(json.dumps({"predicted_answer": "A", "answer": "A"}) + "\n")

    monkeypatch.setattr(longvtg.subprocess, "run", ran)
    for _ in range(2):  # the second time over what the first left
        found = longvtg.scores_elsewhere(longvtg.UNIFIED, "trained", tmp_path, ("--cache", "x"))
    assert found["answers"] == {"direct": 1.0, "grounds": 1.0, "unified": 1.0} and set(found["elsewhere"]) == {
        *longvtg.ELSEWHERE
    }
    models = [(c[c.index("--model") + 1], "--ground_model" in c) for c in commands if c[1] == "infer.py"]
    assert models[:3] == [("trained", False), (longvtg.START, True), ("trained", False)]
    assert all("--overwrite" in c for c in commands if c[1] == "evaluate.py")
    assert "answers" not in longvtg.scores_elsewhere("iou", "trained", tmp_path, ())
    assert set(longvtg.scores_elsewhere("start", longvtg.START, tmp_path, ())["answers"]) == {"direct", "unified"}


def test_longvtg_has_a_line_per_variant_beside_what_it_started_from(tmp_path):
    ledger = Ledger(tmp_path / "rows.jsonl", lambda name: ("mine", longvtg.options_of(name)))

    def scored(value: float) -> dict:
        return {"mIoU": value, "zoom_accuracy": value + 0.1}

    elsewhere = {where: scored(0.3) for where in longvtg.ELSEWHERE}
    answers = {"direct": 0.2, "unified": 0.6}
    ledger.add("start", 0, "ended", elsewhere=elsewhere, answers=answers)
    for seed, value in ((0, 0.6), (1, 0.8)):
        curves = {"zero_variance/tg": [0.5, 0.1], "kl/time": [0.0, 0.2], "kl/text": [0.0, 0.1]}
        found = {"before": {"all": scored(0.4)}, "after": {"all": scored(value)}, "curves": curves}
        paid = {"direct": 0.1, "grounds": 0.7, "unified": value}
        ledger.add(longvtg.UNIFIED, seed, "ended", **found, elsewhere=elsewhere, answers=paid)
        found["curves"]["zero_variance/iou"] = [0.5, 0.1]
        ledger.add("iou", seed, "ended", **found | {"after": {"all": scored(0.5)}}, elsewhere=elsewhere)
    text = longvtg.report(ledger, "x")
    assert "| before training |  |  |  |  | 0.400 | 0.500 | 0.300 | 0.400 | 0.300 | 0.400 |  |  |" in text
    [line] = [line for line in text.splitlines() if line.startswith("| IoU + CenDist | token-aware | 2 |")]
    cells = [cell.split(" ± ")[0].strip() for cell in line.split("|")[4:-1]]
    assert list(map(float, cells)) == [0.5, 0.1, 0.7, 0.8, 0.3, 0.4, 0.3, 0.4, 0.2, 0.1]
    paired = "| IoU + CenDist, token-aware minus IoU, token-aware | 2 | 0.200 ± 1.271 | 0.500 | 2 |"
    assert paired in text  # of 0.1 and 0.3
    assert " minus IoU, uniform" not in text  # which has no run
    assert "| IoU | uniform | 0 |" in text  # a variant without a run has its line
    assert "| direct | - | start | 1 | 0.200 ± 0.000 |" in text
    assert "| ground-then-answer | trained | start | 2 | 0.700 ± 0.000 |" in text
    assert "| unified | trained | trained | 2 | 0.700 ± 0.141 |" in text


# ---------------------------------------------------------------- gpu.py


def test_a_check_fails_for_what_is_not_a_number(capsys):
    gpu_checks.check("right", 1e-3, 2e-3)
    gpu_checks.check("wrong", float("nan"), 2e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[-2].strip() for line in lines] == ["ok", "FAILED"]


def test_the_main_job_tells_kinds_and_lengths_apart():
    def scores(value: float) -> dict:
        return dict.fromkeys((*main_job.SCORES, *main_job.CONTROLS), value)

    def result(value: float) -> dict:
        return {"all": scores(value), "by_kind": {"coarse": scores(value)}, "by_duration": {"0 to 20 s": scores(value)}}

    lines = main_job.table([{"before": result(0.25), "after": result(value)} for value in (0.75, 0.85)]).splitlines()
    change = "| 0.250 ± 0.000 | 0.800 ± 0.071 | 0.550 ± 0.071 |"
    assert {f"| {part} {change}" for part in ("Acc@GQA", "coarse: accuracy", "0 to 20 s: mIoU")} <= set(lines)


def test_the_main_job_s_console_table_is_that_of_its_result_files(tmp_path):
    """Two questions, of which one is found after training: the table's first lines."""
    rows = [{"id": f"q{k}", "video": f"{k}.mp4", "kind": "fine", "duration": 20.0, "answer": "A"} for k in range(2)]
    for label, spans in (("before", [[0, 10], [0, 10]]), ("after", [[10, 20], [0, 10]])):
        told = [
            {**row, "predicted_answer": None, "evidence": [[10, 20]], "predicted": [span]}
            for row, span in zip(rows, spans, strict=True)
        ]
        write_results(tmp_path / f"results-{label}.jsonl", told)
    heading, first = main_job.console(tmp_path).splitlines()[:2]
    assert heading.split() == ["score", "before", "after", "change"]
    assert first.startswith("mIoU") and "0.000 [0.00, 0.00]  0.500 [0.00, 1.00]  +0.500 [+0.00, +1.00] p" in first


def test_a_report_names_what_failed_and_gathers_the_suspects():
    body = ["## kernels", "| a | 1 | 2 | ok |", "suspect: b | refuted", "| c | 3 | 2 | FAILED |"]
    lines = gpu.compose(["# On a GPU"], body).splitlines()
    assert lines[2:4] == ["Failed: 1.", "| c | 3 | 2 | FAILED |"]
    assert lines[-1] == "| b | refuted |" and lines.count("suspect: b | refuted") == 0


def test_what_is_timed_runs_after_all_that_only_checks(tmp_path, monkeypatch):
    ran = []

    def section(name, limit, dry, scratch, take):
        ran.append(name)
        take(f"{name} done")

    monkeypatch.setattr("benchmarks.gpu.run_section", section)
    report = gpu.Report(tmp_path / "gpu.md", True, ["seven", "kernels", "policy"])
    gpu.run_all(report, math.inf, True)
    assert ran == ["kernels", "policy", "seven"]
    assert (tmp_path / "gpu.md").read_text().splitlines()[-3:] == ["seven done", "kernels done", "policy done"]
    gpu.run_all(report, -math.inf, True)
    assert sum(gpu.FAILED in line for line in report.lines()) == 3


def test_rewards_of_a_job_are_summed_and_steps_are_medians():
    steps = [{"seconds/step": k, "seconds/rollout": 1, "seconds/zoom": 2, "seconds/update": 3} for k in (9, 1, 2, 3)]
    rows = [step | {"reward/a_mean": 0.1 * k, "reward/b_mean": 1.0, "reward/a_std": 7} for k, step in enumerate(steps)]
    assert gpu_runs.step_cells(rows) == ["3.00", "1.00", "2.00", "3.00", "1.000", "1.300"]


@pytest.mark.parametrize("apart", [False, True])
def test_cached_attention_passes_its_checks_on_a_cpu(capsys, apart):
    gpu_checks.cached_attention(gpu_checks.Setting(dry=True), (4, 2, 32), torch.bfloat16, apart)
    out = capsys.readouterr().out
    assert out.count("| ok |") == 2 and out.count("stems apart") == 2 * apart


def test_a_job_that_raises_leaves_the_others(capsys):
    def broken(at):
        raise RuntimeError("no such kernel")

    gpu_checks.checks([(broken, (None,)), (gpu_checks.check, ("next", 0.0, 0.0))])
    out = capsys.readouterr().out
    assert "| broken () | RuntimeError |  | FAILED |" in out and "no such kernel" in out and "| next | 0.0e+00" in out


def test_the_kernels_pass_their_checks_on_a_cpu(capsys):
    at = gpu_checks.Setting(dry=True)
    for dtype in (torch.bfloat16, torch.float32):
        gpu_checks.tree_attention(at, (4, 2, 32), dtype, gpu_checks.Tree((40, 9), ((5, 0, 8), (3, 1))))
        gpu_checks.chunked_kl(at, dtype)
    out = capsys.readouterr().out
    assert out.count("| ok |") == 2 * (2 * 4 + 6) and "FAILED" not in out


def test_checks_tell_a_wrong_gradient(capsys, monkeypatch):
    """A kernel that reads the log-sum-exp of another row."""
    right = gpu_checks.attention.attend_backward

    def wrong(grad, q, k, v, out, lse, causal, scale):
        return right(grad, q, k, v, out, lse.roll(1, -1), causal, scale)

    monkeypatch.setattr("engine.attention.attend_backward", wrong)
    gpu_checks.tree_attention(
        gpu_checks.Setting(dry=True), (4, 2, 32), torch.bfloat16, gpu_checks.Tree((40,), ((5, 8),))
    )
    assert capsys.readouterr().out.count("FAILED") == 2 * 3
