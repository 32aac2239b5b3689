"""benchmarks/step.py: PyTorch's step equals this project's, and the floor counts the models' parameters and outputs."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.testing.benchmarks import BENCHMARKS, imported
from zslflax.distributed import AXIS
from zslflax.models import two_tower
from zslflax.models.build import build_two_tower
from zslflax.models.import_weights import load
from zslflax.models.import_weights.layouts import HF_RESNET, TORCHVISION_RESNET
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.vit import VITS, ViT
from zslflax.training.train_state import student_variables, teacher_variables

RESNET50 = {"tower": "resnet50", "teacher_batch_norm": "batch"}
ARGS = SimpleNamespace(**RESNET50, batch=8, image=32, layers=1, width=64, dtype="float32")
STEM, BLOCKS, STEPS = 8, (1, 1), 3


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark as a module; it imports other files of its folder."""
    with imported("step") as (step,):
        yield step


def config_of(benchmark, batch_norm="batch"):
    c = benchmark.configure(ARGS)
    c.teacher.batch_norm = batch_norm
    c.model.text.dropout, c.objective.teacher_temperature = 0.0, 0.1
    c.optimizer.learning_rate = 0.03
    return c


def torch_student(require, c):
    """A small PyTorch student; every parameter and statistic is random."""
    torch, transformers, step_torch = require("torch"), require("transformers"), importlib.import_module("step_torch")
    torch.manual_seed(0)
    sizes = [STEM * 4 * 2**stage for stage in range(len(BLOCKS))]
    resnet = transformers.ResNetConfig(embedding_size=STEM, hidden_sizes=sizes, depths=BLOCKS, layer_type="bottleneck")
    image = step_torch.Pooled(transformers.ResNetModel(resnet))
    student = step_torch.TwoTower(image, sizes[-1], step_torch.bert(c.model.text), c, bf16=False)
    with torch.no_grad():
        for parameter in [*student.image.parameters(), *student.text.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return step_torch.Distillation(student, c, compiled=False)


def import_variables(model, torch_model, folder):
    """A PyTorch TwoTower's variables as those of `model`."""
    save, (width, shape) = importlib.import_module("safetensors.torch").save_file, (2, (2, 32, 32, 3))
    shapes = jax.eval_shape(
        model.init,
        jax.random.key(0),
        np.zeros(shape, np.uint8),
        np.zeros((2, width), np.int32),
        np.ones((2, width), bool),
    )
    params, stats = shapes["params"], shapes["batch_stats"]["image"]["tower"]
    for name, tower in (("image", torch_model.image), ("text", torch_model.text)):
        (folder / name).mkdir(exist_ok=True)
        save({key: x.contiguous() for key, x in tower.state_dict().items()}, folder / name / "model.safetensors")
    image = load.load_variables(
        folder / "image",
        {"params": params["image"]["tower"], "batch_stats": stats},
        (TORCHVISION_RESNET, HF_RESNET),
    )
    text = load.load_text_tower(folder / "text", {"params": params["text"]["tower"]})
    linear = lambda x: {"kernel": x.weight.detach().numpy().T.copy(), "bias": x.bias.detach().numpy().copy()}
    params = {
        "image": {"tower": image["params"], "projection": linear(torch_model.project_image)},
        "text": {"tower": text["params"], "projection": linear(torch_model.project_text)},
    }
    return {"params": params, "batch_stats": {"image": {"tower": image["batch_stats"]}}}


def assert_equal_variables(found, wanted):
    """Variances may differ by n / (n − 1), by which PyTorch multiplies the batch's; n is at least 8 · 4 · 4 here."""
    found = {**found, "params": {name: found["params"][name] for name in ("image", "text")}}

    def compare(path, x, y):
        tolerance = dict(rtol=1e-2) if path[-1].key == "var" else dict(rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, wanted)


@pytest.mark.parametrize("batch_norm", ["batch", "ema"])
def test_both_have_the_same_losses_student_and_teacher(require, benchmark, tmp_path, batch_norm):
    c, batch = config_of(benchmark, batch_norm), benchmark.draw_batch(ARGS)
    theirs = torch_student(require, c)
    model = build_two_tower(c.model, axis_name=AXIS)
    tower = ResNet(BLOCKS, True, stem_width=STEM, axis_name=AXIS)
    model = model.clone(image=two_tower.ProjectedTower(tower, nn.Dense(c.model.embed_dim)))
    start = import_variables(model, theirs.student, tmp_path)
    ours = benchmark.Step(c, model, start, benchmark.packed(batch))
    inputs = importlib.import_module("step_torch").from_numpy(batch["image"], batch["text"], batch["text_mask"], "cpu")
    losses = np.array([[float(ours()), float(theirs(*inputs))] for _ in range(STEPS)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0] - 0.05  # the student moved, so that the later losses depend on the gradients
    assert_equal_variables(student_variables(ours.state), import_variables(model, theirs.student, tmp_path))
    assert_equal_variables(teacher_variables(ours.state), import_variables(model, theirs.teacher, tmp_path))
    with pytest.raises(AssertionError):
        assert_equal_variables(teacher_variables(ours.state), import_variables(model, theirs.student, tmp_path))
    scales = theirs.student.log_scales.detach().numpy()
    params = ours.state.params["objective"]
    np.testing.assert_allclose([params["log_logit_scale"], params["log_soft_logit_scale"]], scales, rtol=1e-5)


def test_the_floor_counts_the_models_parameters_and_outputs(benchmark):
    args = SimpleNamespace(**RESNET50, batch=1, image=224, layers=12, width=768, dtype="bfloat16")
    model = build_two_tower(benchmark.configure(args).model)
    inputs = [jax.ShapeDtypeStruct((1, 60), kind) for kind in (np.int32, bool)]
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), image, *inputs)["params"]
    parameters = sum(x.size for x in jax.tree.leaves(params))
    tower, pixels = ResNet(*RESNETS["resnet50"]), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    jaxpr = jax.make_jaxpr(tower.apply)(jax.eval_shape(tower.init, jax.random.key(0), pixels), pixels)
    outputs = sum(e.outvars[0].aval.size for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated")
    assert outputs == pytest.approx(benchmark.TOWERS["resnet50"]["outputs"], rel=0.01)

    def step(captions, **rates):
        return benchmark.floor(args, captions, {"matrix_rate": 1e3, "bandwidth": 1e3} | rates)

    tokens = int(benchmark.caption_lengths(1000).sum())
    dense = 12 * (3 + 1 + 4 + 4) * 768**2  # a token's multiplications
    assert step(1000)["matrix_ms"] == pytest.approx(4 * 2 * (1000 * 4.09e9 + tokens * dense))
    assert step(1000, matrix_rate=2e3)["matrix_ms"] == step(1000)["matrix_ms"] / 2
    values = 1000 * outputs + tokens * 12 * (3 + 1 + 4 + 1) * 768
    assert step(1000)["memory_ms"] == pytest.approx(7 * 2 * values + 32 * parameters, rel=0.01)
    assert step(0)["memory_ms"] == pytest.approx(32 * parameters, rel=0.02)


def test_the_floor_counts_the_vits_products_outputs_and_parameters(benchmark):
    tower, pixels = ViT(*VITS["vit_b16"]), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(tower.init, jax.random.key(0), pixels)
    counted = benchmark.TOWERS["vit_b16"]
    assert counted["parameters"] == pytest.approx(sum(x.size for x in jax.tree.leaves(variables)), rel=0.01)
    dense = 12 * (3 + 1 + 4 + 4) * 768**2 * 197 + 196 * 768 * 768  # and the patches
    assert counted["macs"] == pytest.approx(dense, rel=0.01)
    assert counted["outputs"] == pytest.approx(12 * (3 + 1 + 4 + 1) * 768 * 197 + 196 * 768, rel=0.01)


def test_a_contender_without_enough_memory_is_reported_and_the_others_continue(benchmark, monkeypatch, capsys):
    tried, rates = [], {"torch": 50.0, "torch_compiled": 100.0, "zslflax": 150.0}

    def measure(name, batch, args, cache):
        tried.append((name, batch))
        if name in benchmark.RATES:
            return {"matrix_rate": 1e15, "bandwidth": 1e12}
        if name == "torch" and batch > 1:
            return {"failed": "out of memory"}
        return {"pairs_per_second": rates[name] * batch, "step_ms": 1e3 / rates[name]}

    monkeypatch.setattr(benchmark, "in_own_process", measure)
    monkeypatch.setattr(sys, "argv", ["step.py", "--batch", "4", "1", "2", "--rounds=2", "--contenders", *rates])
    benchmark.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [batch for name, batch in tried if name == "torch"] == [1, 1, 2]
    assert [line["batch"] for line in lines if "failed" in line] == [2]
    table = lines[-1]["batches"]
    assert table["1"]["torch"]["ratio"] == 0.5 and table["4"]["zslflax"]["ratio"] == 1.5
    assert table["4"].keys() == {"torch_compiled", "zslflax"}


def test_out_of_memory_is_distinguished_from_other_failures(benchmark, tmp_path):
    sizes = RESNET50 | {"layers": 1, "width": 64, "steps": 1}
    too_large = SimpleNamespace(**sizes, image=10**7, dtype="float32")  # petabytes
    assert benchmark.in_own_process("zslflax", 8, too_large, tmp_path) == {"failed": "out of memory"}
    mistyped = SimpleNamespace(**sizes, image=32, dtype="float31")
    assert "float31" in benchmark.in_own_process("zslflax", 8, mistyped, tmp_path)["failed"]


def test_the_benchmark_needs_no_tokenizer_codec_or_data_library():
    absent = "grain", "simplejpeg", "cv2", "PIL", "transformers", "tensorflow_datasets", "array_record", "torch", "tqdm"
    script = f"import sys; sys.modules |= dict.fromkeys({absent}); sys.path.insert(0, {str(BENCHMARKS)!r}); import step"
    subprocess.run([sys.executable, "-c", script], check=True)
