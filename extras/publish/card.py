"""A model card: what a model was trained from, on what, how well it did, what nobody measured.

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
from rewards import InputError, refusing

LOADING = {
    "transformers": "`AutoModelForCausalLM.from_pretrained(PATH)` of transformers 5 gives a model "
    "whose every position sees every other (`config.is_causal` is false; older releases ignore it)."
    " `model.generate` writes from left to right, which is not what it does: use `wd1.generate`.",
    "peft": "`wd1.load_model(PATH)`, or `PeftModel.from_pretrained(base, PATH)` on the base that "
    "`wd1.load_model` gives. `python -m extras.publish.export` merges the adapters.",
    "llada": "By LLaDA's own code, `modeling_llada.py` and `configuration_llada.py`, which are not "
    "here: copy them from the original repository. `wd1.load_model(PATH)` needs no such code.",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

`{{ settings.model }}`, a diffusion language model, after {{ summary.steps }} steps of
reinforcement learning ({{ settings.objective or "wd1" }}) on {{ settings.task }}.

## Results

| tokens | accuracy before | accuracy after |
| --- | --- | --- |
{{ results }}

On {{ summary.after.problems }} held-out problems, at temperature 0, ± one standard error of
counting them. It is one run with one seed: that says nothing of other runs.

## Training

{{ summary.forward_passes }} forward passes in {{ summary.seconds | int }} seconds, with

```json
{{ all_settings }}
```

## Loading

{{ loading }}

## Limits

Trained for the reward of one task and evaluated on problems from the same source. Nothing else was
measured: not what it has lost elsewhere, and nothing about safety. Only what the reward looks at
counts, the final answer: no step of the reasoning is checked.
"""


def short(value):
    """A path's last name, or a name on the hub; without what would have a meaning in a text."""
    if not isinstance(value, str):
        return value
    path = Path(value)
    return re.sub(r"[^\w./:+-]", "-", path.name if path.is_absolute() else str(path))


def share(figures, problems):
    """An accuracy, and the standard error of counting it."""
    p = figures["accuracy"]
    return f"{p:.1%} ± {math.sqrt(p * (1 - p) / problems):.1%}"


def model_card(run, form):
    """The text of the card of the model in a run's directory, which is stored in a `form` of
    LOADING."""
    with refusing(f"{run}: its config.json and summary.json do not tell enough for a model card"):
        settings = json.loads((run / "config.json").read_text())
        summary = json.loads((run / "summary.json").read_text())
        base, after = settings["model"], summary["after"]
        hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(@\w+)?", base)
        settings = {n: short(value) for n, value in settings.items() if n != "output_dir"}
        name, task = short(str(run.resolve())), settings["task"]
        lines = []
        for length, figures in after["lengths"].items():
            pair = summary["before"]["lengths"][length], figures
            cells = (share(each, after["problems"]) for each in pair)
            lines.append(f"| {length} | {' | '.join(cells)} |")
        common = dict(dataset_type=task, dataset_name=task, task_type="text-generation")
        data = ModelCardData(
            model_name=name,
            library_name="peft" if form == "peft" else "transformers",
            pipeline_tag="text-generation",
            tags=["diffusion-language-model", "reinforcement-learning", "wd1"],
            base_model=hub_id[1] if hub_id and not Path(base).exists() else None,
            eval_results=[
                EvalResult(metric_type=metric, metric_value=after[metric], **common)
                for metric in ("accuracy", "reward")
            ],
        )
        text = dict(name=name, settings=settings, summary=summary, loading=LOADING[form])
        text |= dict(results="\n".join(lines), all_settings=json.dumps(settings, indent=2))
        return str(ModelCard.from_template(data, template_str=TEMPLATE, **text))


def main(argv):
    """Writes a run's card into its model's directory."""
    model = Path(*argv) / "model"
    if len(argv) != 1 or not model.is_dir():
        raise InputError("name one finished run: a directory with model/ in it")
    form = "peft" if (model / "adapter_config.json").is_file() else "transformers"
    (model / "README.md").write_text(model_card(model.parent, form), encoding="utf-8")


if __name__ == "__main__":
    with wd1.one_sentence():
        main(sys.argv[1:])
