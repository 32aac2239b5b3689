"""The model card of an exported model: README.md, as the Hugging Face Hub shows it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from zslflax.config import is_classifier
from zslflax.files import read_json, read_text

CARD = """\
---
{metadata}
---

# {name}

{model}

## Training data

{data}

## Evaluation

{metrics}

## Licence

{license}

## Limits

{limits} Evaluate the model on your own images before you rely on it.
"""
ZERO_SHOT = """\
A zero-shot image classifier: it chooses among any class names, without having been trained on labels for them. The
{image} image tower (images of {size} × {size} pixels) and a text tower share an embedding space of {width} dimensions.
{origin}

## Use

```python
from zslflax import Predictor

predictor = Predictor.restore("this folder, or its id on the Hugging Face Hub")
predictor.classify("image.jpg", ["a cat", "a dog"])
predictor.search("a cat on a sofa", ["one.jpg", "two.jpg"])
```

Prompts: {templates}. `zslflax.safetensors` has the weights, `config.json` the sizes and prompts, `text_encoder/` the
tokenizer. The weights have zslflax's names: transformers and open_clip do not load them.{onnx}"""
TRAINED = "They were trained with zslflax (objective {objective}, step {step})."
PUBLISHED = "This is a published model, which zslflax has exported without training it."
CLASSIFIER = """\
An image classifier of {classes} classes. The {image} image tower (images of {size} × {size} pixels) and its linear head
were trained with zslflax (objective {objective}, step {step}).

## Use

```python
from zslflax import Predictor

classifier = Predictor.restore("this folder, or its id on the Hugging Face Hub")
classifier.classify("image.jpg")
```

`zslflax.safetensors` has the weights, `config.json` the sizes and the names of the classes. The weights have zslflax's
names: transformers does not load them.{onnx}"""
ZERO_SHOT_LIMITS = """\
The model has learnt what its captions say of images, with their errors and biases. A class name that the captions
never use is recognised worse, and every image gets an answer, also one that no class name fits."""
CLASSIFIER_LIMITS = """\
The model has learnt what its training data say of images, with their errors and biases. Every image gets one of the
classes, also one that shows none of them."""
ONNX = """ `image_tower.onnx` maps uint8
images [batch, {size}, {size}, 3] to unit vectors, and `text_tower.onnx` maps token ids and their mask, int32 and bool
[batch, {tokens}], to unit vectors; both compute in float32."""
CLASSIFIER_ONNX = """ `image_tower.onnx` maps uint8
images [batch, {size}, {size}, 3] to the probabilities of the classes, and computes in float32."""
MEASURES = ("hit@", "mAP", "image_to_text@", "text_to_image@", "hierarchical@")  # what the table shows


class CardFacts(NamedTuple):
    """What a card says beyond the config.

    Attributes:
        license: an identifier of the Hub, such as "apache-2.0"; "" where it is not known.
        data: words about the training data; "" for none.
        samples: number of training samples; 0 where it is not known.
        metrics: values by flat name, with "NAME/low" and "NAME/high" for the ends of the 95% interval.
    """

    license: str = ""
    data: str = ""
    samples: int = 0
    metrics: dict[str, float] = {}


def read_facts(workdir: Path, step: int, license: str = "", data: str = "") -> CardFacts:
    """Reads what a workdir knows of the training data, and of the evaluation of a step.

    Values come from evaluation/STEP.json, which has intervals, or else from metrics.jsonl. A folder that is no workdir
    gives none.
    """
    samples, metrics = 0, dict[str, Any]()
    if (workdir / "data.json").is_file():
        samples = sum(entry.get("samples", 0) for entry in read_json(workdir / "data.json", list))
    if (evaluated := workdir / "evaluation" / f"{step}.json").is_file():
        metrics = read_json(evaluated).get("metrics", {})
    elif (workdir / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in read_text(workdir / "metrics.jsonl").splitlines() if line.endswith("}")]
        metrics = next((line for line in reversed(lines) if line.get("step") == step), {})
    found = {name: value for name, value in metrics.items() if name.startswith("eval/") and is_shown(name)}
    return CardFacts(license, data, samples, {name: float(value) for name, value in found.items() if value is not None})


def is_shown(name: str) -> bool:
    """Whether the table has the metric of a flat name: of the shipped model, in per cent, and no harmonic mean.

    >>> is_shown("eval/test/hit@1/low"), is_shown("eval/test/student/hit@1"), is_shown("eval/test/labelled")
    (True, False, False)
    """
    parts = name.split("/")
    measured = any(part.startswith(MEASURES) for part in parts)
    return measured and not {"student", "harmonic"} & set(parts[2:])


def model_card(config: ConfigDict, step: int, facts: CardFacts | None = None, onnx: bool = False) -> str:
    """Returns the text of README.md.

    Args:
        config: the whole config.
        step: of the checkpoint; 0 of a published model.
        facts: what else is known.
        onnx: whether the folder has the towers as ONNX.
    """
    facts = facts or CardFacts()
    classifier = is_classifier(config)
    samples = f"{facts.samples:,} {'images' if classifier else 'image-caption pairs'}" if facts.samples else ""
    described = ", ".join(filter(None, (facts.data, samples)))
    license = f"The weights are under {facts.license}." if facts.license else "The author of the model has given none."
    size, tokens = config.model.image.size, config.model.text.max_tokens
    model = (CLASSIFIER if classifier else ZERO_SHOT).format(
        image=config.model.image.name or "ViT",
        size=size,
        origin=TRAINED.format(objective=config.objective.name, step=step) if step else PUBLISHED,
        objective=config.objective.name,
        step=step,
        width=config.model.embed_dim,
        classes=len(config.model.class_names),
        templates=", ".join(f'"{template}"' for template in config.eval.templates),
        onnx=(CLASSIFIER_ONNX if classifier else ONNX).format(size=size, tokens=tokens) if onnx else "",
    )
    return CARD.format(
        metadata=metadata(config, facts),
        name=config.name,
        model=model,
        limits=CLASSIFIER_LIMITS if classifier else ZERO_SHOT_LIMITS,
        data=f"{described}." if described else "The author of the model has not described it.",
        metrics=metrics_table(facts.metrics) or "The model was exported without results.",
        license=license,
    )


def metadata(config: ConfigDict, facts: CardFacts) -> str:
    """Returns the YAML head of the card."""
    import huggingface_hub  # the import takes 0.3 s, and only an export needs it

    task = "image-classification" if is_classifier(config) else "zero-shot-image-classification"
    results = [
        huggingface_hub.EvalResult(
            task_type=task,
            dataset_type=name.split("/")[1],
            dataset_name=name.split("/")[1],
            metric_type=name.split("/", 2)[2],
            metric_value=round(value, 4),
        )
        for name, value in facts.metrics.items()
        if not name.endswith(("/low", "/high"))
    ]
    data = huggingface_hub.ModelCardData(
        library_name="zslflax",
        pipeline_tag=task,
        license=facts.license or None,
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def metrics_table(metrics: dict[str, float]) -> str:
    """Returns a table of metrics in per cent, with 95% intervals where they are known.

    >>> print(metrics_table({"eval/pets/hit@1": 0.5, "eval/pets/hit@1/low": 0.4, "eval/pets/hit@1/high": 0.6}))
    | test set | metric | % | 95% interval |
    |---|---|---|---|
    | pets | hit@1 | 50.0 | 40.0 to 60.0 |
    """
    rows = []
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        _, test_set, metric = name.split("/", 2)
        ends = [metrics.get(f"{name}/{end}") for end in ("low", "high")]
        interval = "–" if None in ends else " to ".join(f"{100 * end:.1f}" for end in ends if end is not None)
        rows.append(f"| {test_set} | {metric} | {100 * value:.1f} | {interval} |")
    return "\n".join(["| test set | metric | % | 95% interval |", "|---|---|---|---|", *rows]) if rows else ""
