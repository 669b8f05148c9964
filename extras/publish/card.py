"""A model card: what a saved model was trained from, on what, how well it did, what nobody measured.

    python -m extras.publish.card runs/X          # writes runs/X/model/README.md

Everything comes from the run's own files, never from memory or good intentions. A licence is not
among them: that is for whoever publishes the model to give, and the base model's may bind them.
"""

import json
import math
import re
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import wd1
from extras.watch.chat import visible
from rewards import InputError, refusing

LOADING = {
    "transformers": "`AutoModelForCausalLM.from_pretrained(PATH)` of transformers 5 gives a model "
    "whose every position sees every other (`config.is_causal` is false; older releases ignore it). "
    "`model.generate` writes from left to right, which is not what it does: use `wd1.generate`.",
    "peft": "`wd1.load_model(PATH)`, or `PeftModel.from_pretrained(base, PATH)` on the base that "
    "`wd1.load_model` gives. `python -m extras.publish.export` merges the adapters.",
    "llada": "By LLaDA's own code, `modeling_llada.py` and `configuration_llada.py`, which are not "
    "here: copy them from the original repository. `wd1.load_model(PATH)` needs no such code.",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

`{{ base }}`, a diffusion language model, after {{ steps }} steps of reinforcement learning
({{ objective }}) on {{ task }}.

## Results

{{ results }}

On {{ problems }} held-out problems, at temperature 0, ± one standard error of counting them. It is one
run with one seed: that says nothing of other runs.

## Training

{{ settings }}

## Loading

{{ loading }}

## Limits

Trained for the reward of one task and evaluated on problems from the same source. Nothing else was
measured: not what it has lost elsewhere, and nothing about safety. Only what the reward looks at
counts, the final answer: no step of the reasoning is checked.{{ limits }}
"""


def short(source):
    """A model's name without the way to it, fit to stand in a text."""
    path = Path(str(source))
    parts = path.parts[-2:] if path.name == "model" or not path.is_absolute() else path.parts[-1:]
    return visible("/".join(parts)).replace("`", "'").replace("|", "/")[:200] or "?"


def table(header, rows):
    """A Markdown table."""
    cells = [[visible(str(cell)).replace("|", "\\|") for cell in row] for row in rows]
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *cells)]
    return "\n".join(f"| {line} |" for line in lines)


def model_card(run, form=None):
    """The text of the card of the model in a run's directory. form: how the model is stored,
    "transformers", "peft" or "llada"; by default it is looked up."""
    run = Path(run)
    with refusing(f"{run}: its config.json and summary.json do not tell enough for a model card"):
        settings = json.loads((run / "config.json").read_text())
        summary = json.loads((run / "summary.json").read_text())
        adapted = (run / "model" / "adapter_config.json").is_file()
        form = form or ("peft" if adapted else "transformers")
        after, count, task = summary["after"], summary["after"]["problems"], short(settings["task"])
        rows = []
        for length, figures in after["lengths"].items():
            accuracy = [summary["before"]["lengths"][length]["accuracy"], figures["accuracy"]]
            error = [math.sqrt(p * (1 - p) / count) for p in accuracy]
            rows.append([length, *(f"{p:.1%} ± {e:.1%}" for p, e in zip(accuracy, error))])
        fixed = wd1.Config(model="published/defaults", task="countdown", device="cpu", dtype="float32")
        defaults = vars(fixed) | dict.fromkeys("model task output_dir data test_data".split())
        told = {name: short(settings[name]) for name in ("model", "task")}
        told |= {name: short(settings[name]) for name in ("data", "test_data") if settings[name]}
        changed = {n: v for n, v in settings.items() if n not in defaults or v != defaults[n]}
        changed = {n: v for n, v in changed.items() if n not in (*told, "output_dir", "device")}
        spent = {name: round(summary[name]) for name in ("steps", "seconds", "forward_passes")}
        warning = run / "warning.txt"
        names = dict(dataset_type=task, dataset_name=task, task_type="text-generation")
        data = ModelCardData(
            model_name=short(run.resolve()),
            library_name="peft" if form == "peft" else "transformers",
            pipeline_tag="text-generation",
            tags=["diffusion-language-model", "reinforcement-learning", "wd1"],
            base_model=settings["model"] if is_hub_id(settings["model"]) else None,
            eval_results=[
                EvalResult(metric_type=name, metric_value=after[name], **names)
                for name in ("accuracy", "reward")
            ],
        )
        card = ModelCard.from_template(
            data,
            template_str=TEMPLATE,
            name=short(run.resolve()),
            base=short(settings["model"]),
            objective=visible(str(settings.get("objective", "wd1"))),
            task=task,
            steps=spent["steps"],
            problems=count,
            results=table(["tokens", "accuracy before", "accuracy after"], rows),
            settings=table(["setting", "value"], (told | spent | changed).items()),
            loading=LOADING[form],
            limits=" Warned at " + visible(warning.read_text()) if warning.is_file() else "",
        )
        return str(card)


def is_hub_id(source):
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and not Path(source).exists()


def main(argv):
    """Writes a run's card into its model's directory."""
    if len(argv) != 1 or not (Path(argv[0]) / "model").is_dir():
        raise InputError("name one finished run: a directory with model/ in it")
    (Path(argv[0]) / "model" / "README.md").write_text(model_card(argv[0]), encoding="utf-8")


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
