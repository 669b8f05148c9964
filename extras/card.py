"""A model card: what a saved model was trained from, on what, how well it did and what nobody has measured.

Everything comes from the run's own files (config.json, summary.json, metrics.jsonl), never from memory or good intentions.
A licence is not among them: that is for whoever publishes the model to give, and the base model's may bind them.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from extras.vetting import own
from extras.watch import visible
from rewards import InputError, Task, refusing

UNCHECKED = {  # what the reward of a task does not look at
    "sudoku": "only the 16 digits of the answer count: neither the reasoning nor anything else outside the answer tags",
    "countdown": "only the expression in the answer counts: neither the reasoning nor anything else outside the answer tags",
    "gsm8k": "the final number and the tags count: no step of the reasoning is looked at",
    "math": "the final answer and its format count: no step of the reasoning is looked at",
}
LOADING = {  # how to load what was saved, by its form
    "transformers": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # transformers 5

model = AutoModelForCausalLM.from_pretrained("PATH").eval()
assert model.config.is_causal is False  # from config.json: every position sees every other. Older releases ignore it
tokenizer = AutoTokenizer.from_pretrained("PATH")
ids = tokenizer(f"2 + 2 = {tokenizer.decode(model.config.mask_token_id)}", return_tensors="pt").input_ids
logits = model(ids, use_cache=False).logits  # at a mask: of the token that belongs there (if logit_shift, one to the left)
```

`model.generate` writes from left to right, which is not what this model does: sample with `wd1.generate`.""",
    "peft": """```python
import wd1
from peft import PeftModel

base, tokenizer = wd1.load_model("BASE")  # a stock transformers class without its causal mask
model = PeftModel.from_pretrained(base, "PATH").eval()
```

`python -m extras.export PATH OUT` merges these LoRA adapters into the weights, in LLaDA's own format or in transformers'.""",
    "llada": """```python
from transformers import AutoModel, AutoTokenizer  # the release that the original repository asks for

model = AutoModel.from_pretrained("PATH", trust_remote_code=True, torch_dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

That runs `modeling_llada.py` and `configuration_llada.py`, which are not here: copy them from the original LLaDA repository
into this directory. `wd1.load_model` needs no such code.""",
}
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def saved_model(source):
    """The model that `source` names: of a run directory its model/, else `source`, for load_model to understand."""
    with refusing(f"{str(source):.100}: not a path"):
        path = Path(source).expanduser()
        if not (path / "metrics.jsonl").is_file():
            return str(source)
        if not (path / "model").is_dir():
            raise InputError(f"{source}: this run has no model/ yet: --resume goes on with it to its end")
        return str(path / "model")


def run_settings(model):
    """The settings of the run that saved the directory `model`, from the config.json above it; {} if there is none."""
    with refusing(f"{model}: the config.json of its run cannot be read"):
        path = Path(model).expanduser().resolve()
        if path.name != "model" or not (path.parent / "metrics.jsonl").is_file():
            return {}
        settings = json.loads((path.parent / "config.json").read_text())
    return settings if isinstance(settings, dict) else {}


def lineage(model):
    """[model, what that was trained from, what that was trained from, ...], as far back as directories tell."""
    known = [str(model)]
    while len(known) < 20:
        path, base = Path(known[-1]).expanduser(), None
        if (path / "adapter_config.json").is_file():
            with refusing(f"{path}: adapter_config.json cannot be read"):
                base = json.loads(own(path, "adapter_config.json").read_text()).get("base_model_name_or_path")
        elif path.is_dir():
            base = run_settings(path).get("model")
        if not isinstance(base, str) or base in known:
            break
        known.append(base)
    return known


def table(*rows):
    """Rows of cells in markdown, the first of them the header."""
    cells = [[visible(str(cell)).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]])


def name_of(source):
    """A model's or a file's name without the way to it, which is nobody else's business, fit to stand in a text."""
    path = Path(source)
    parts = [source] if is_hub_id(source) else path.parts[-2:] if path.name == "model" else path.parts[-1:]
    return visible("/".join(parts)).replace("`", "'") or "?"


def task_name(settings):
    """The task, without the way to its file."""
    return visible(settings["task"].rpartition("/")[2])


def is_hub_id(source):
    return bool(re.fullmatch(HUB_ID, source)) and not Path(source).exists()


def model_card(run, form=None):
    """The card (README.md, with the hub's YAML front matter) of the model in a run's directory.

    form: "transformers", "peft" or "llada", how the model is stored; by default it is looked up in model/.
    """
    with refusing(f"{run}: config.json, summary.json and metrics.jsonl do not tell enough for a model card"):
        run = Path(run)
        settings, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
        history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        form = form or ("peft" if (run / "model/adapter_config.json").is_file() else "transformers")
        return front_matter(run, settings, summary, form) + body(run, settings, summary, history, form)


def front_matter(run, settings, summary, form):
    """What the hub reads. Values are JSON, which is YAML whatever characters are in them."""
    task = task_name(settings)
    metrics = [dict(type=name, value=summary["after"][name], name=f"held-out {name}") for name in ("accuracy", "reward")]
    result = dict(task={"type": "text-generation"}, dataset=dict(name=data_of(settings), type=task), metrics=metrics)
    origin = lineage(settings["model"])[-1]
    entries = {"base_model": visible(origin)} if is_hub_id(origin) else {}
    entries |= {"library_name": "peft" if form == "peft" else "transformers", "pipeline_tag": "text-generation"}
    entries["tags"] = ["diffusion-language-model", "reinforcement-learning", "wd1", task] + ["lora"] * (form == "peft")
    entries["model-index"] = [dict(name=visible(run.resolve().name), results=[result])]
    return "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items()) + "---\n\n"


def data_of(settings):
    """Where the problems came from, in words."""
    if settings["data"] or settings["test_data"]:
        files = [name_of(settings[name]) for name in ("data", "test_data") if settings[name]]
        return f"{task_name(settings)}, from {' and '.join(files)}"
    return {"gsm8k": "openai/gsm8k", "math": "ankner/math-500"}.get(settings["task"], f"{task_name(settings)}, generated")


def body(run, settings, summary, history, form):
    from wd1 import Config

    base, task = name_of(settings["model"]), task_name(settings)
    count = summary["after"].get("problems", settings["eval_size"])  # runs of old do not say
    problems = f"{count} held-out problems"

    def share(value):
        return f"{value:.1%} ± {math.sqrt(value * (1 - value) / count):.1%}"

    results = [("tokens", "accuracy before", "accuracy after", "reward before", "reward after")]
    for length in summary["after"]["lengths"]:
        pair = [summary[when]["lengths"][length] for when in ("before", "after")]
        results.append((length, *(share(one["accuracy"]) for one in pair), *(f"{one['reward']:.3f}" for one in pair)))
    rewards = [line["reward"] for line in history if "reward" in line]
    facts = [
        ("base model", f"`{base}`"), ("task", task), ("problems", data_of(settings)),
        ("held out", "all of the test file" if settings["test_data"] else f"one key in {Task.held_out} of the file"
         if settings["data"] else "a test split of its own"),
        ("steps", summary["steps"]), ("completions sampled", summary["steps"] * settings["batch_size"]),
        ("mean reward of a step's samples", f"{rewards[0]:.3f} at first, {rewards[-1]:.3f} at last" if rewards else "-"),
        ("seconds", f"{summary['seconds']:.0f}"), ("forward passes", summary["forward_passes"]),
        ("updates skipped, not being finite", summary["skipped_updates"]),
        ("versions that wrote this card", f"torch {torch.__version__}, transformers {transformers.__version__}"),
    ]  # fmt: skip
    told = {"model", "task", "data", "test_data", "output_dir", "resume", "eval_only", "dry_run"}
    defaults = {name: value for name, value in asdict(Config()).items() if name not in told}
    changed = [(name, settings[name]) for name, default in defaults.items() if settings[name] != default]
    loading = LOADING[form].replace("BASE", name_of(lineage(run / "model")[1]) if form == "peft" else base)
    if form != "llada":
        loading += "\n\n`wd1.load_model(PATH)` reads it as well, and `python -m extras.chat PATH` talks to it."
    limits = [
        f"Trained for the reward of one task, {task}, and evaluated on {problems} from the same source, at temperature 0. "
        "Nothing else was measured: not what it has lost elsewhere, and nothing about safety.",
        f"Of what it writes, {UNCHECKED.get(task, 'only what the reward of the task looks at counts')}.",
        "This is one run with one seed. The standard error is that of counting problems, sqrt(p (1 - p) / N): it says nothing "
        f"of other runs, and nothing at 0% or 100%, which {count} problems cannot tell from {3 / count:.1%} more or less.",
    ]
    if settings["model"] == "tiny" or settings["model"].endswith(".json"):
        limits.append("It is a tiny model for demonstrations, or began with random weights: it does this task at best.")
    if settings["cache"] != "none" or settings["threshold"] < 1:
        how = f"cache {visible(settings['cache'])}, threshold {settings['threshold']}"
        limits.append(f"Completions were sampled approximately ({how}), in training and in evaluation alike.")
    if settings["load_in_4bit"]:
        limits.append("Trained on a base in 4 bits: on, or merged into, weights in 16 bits it is a slightly different model.")
    limits += [f"Warned at step {line['step']}: {visible(line['warning'])}." for line in history if "warning" in line]
    objective, steps = visible(settings["objective"]), summary["steps"]
    return f"""# {name_of(str(run.resolve()))}

`{base}`, a diffusion language model, after {steps} steps of reinforcement learning ({objective}).

## Results

{table(*results)}

On {problems}, at temperature 0, ± one standard error.

## Training

{table(("", ""), *facts)}

Settings other than the defaults of `wd1.py`:

{table(("setting", "value"), *changed)}

## Loading

{loading}

## Limits

{chr(10).join("- " + limit for limit in limits)}
"""
