"""The same training step in PyTorch, with which benchmarks/step.py compares this project's.

It is built from common libraries: ResNet-50 from timm, torchvision or transformers, ViT-B/16 from timm, transformers'
BertModel, autocast.
"""

import copy
import importlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from zslflax.models.build import resolve_model

LARGEST_LOG_SCALE = math.log(100.0)


def image_tower(name: str) -> tuple[nn.Module, int, str]:
    """A tower without its classifier, pixels [b, 3, s, s] → features [b, f]; f; and the name of its library."""
    if name == "vit_b16":
        import timm

        return timm.create_model("vit_base_patch16_224", num_classes=0), 768, f"timm {timm.__version__}"
    model, library = resnet50()
    return model, 2048, library


def resnet50() -> tuple[nn.Module, str]:
    """ResNet-50 and the name of its library."""
    makers = {
        "timm": lambda timm: timm.create_model("resnet50", num_classes=0),
        "torchvision": lambda torchvision: without_classifier(torchvision.models.resnet50()),
        "transformers": lambda transformers: Pooled(transformers.ResNetModel(transformers.ResNetConfig())),
    }
    for name, make in makers.items():
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        return make(library), f"{name} {library.__version__}"
    raise ImportError(f"expected one of {', '.join(makers)}")


def without_classifier(model: nn.Module) -> nn.Module:
    """The model with its last layer replaced by the identity."""
    model.fc = nn.Identity()
    return model


class Pooled(nn.Module):
    """transformers' ResNetModel with pooled features as its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixels).pooler_output.flatten(1)


def bert(text) -> nn.Module:
    """transformers' BertModel with SDPA, for the section `model.text` of zslflax's config.

    It has no dropout on attention weights, as zslflax's BERT has none.
    """
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=text.scratch.vocab_size,
        hidden_size=text.scratch.width,
        num_hidden_layers=text.scratch.layers,
        num_attention_heads=text.scratch.heads,
        intermediate_size=4 * text.scratch.width,
        hidden_dropout_prob=text.dropout,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


class TwoTower(nn.Module):
    """`zslflax.models.two_tower`: towers in bf16 by autocast (or fp32), projections and unit vectors in fp32."""

    def __init__(self, image: nn.Module, image_width: int, text: nn.Module, config, bf16: bool):
        """`config` is zslflax's whole config."""
        super().__init__()
        self.image, self.text = image.to(memory_format=torch.channels_last), text
        self.project_image = nn.Linear(image_width, config.model.embed_dim)
        self.project_text = nn.Linear(text.config.hidden_size, config.model.embed_dim)
        self.log_scales = nn.Parameter(torch.full((2,), config.objective.log_logit_scale))  # hard, soft
        image = resolve_model(config.model).image
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(image[name])[:, None, None])
        self.bf16 = bf16

    def forward(self, image, text, text_mask):
        """uint8 [b, 3, s, s], int64 [b, t], bool [b, t] → unit vectors fp32 [b, d] of images and texts."""
        pixels = (image.float() / 255.0 - self.mean) / self.std
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.bf16):
            image_features = self.image(pixels)
            tokens = self.text(input_ids=text, attention_mask=text_mask).last_hidden_state
        weight = text_mask[:, :, None].float()
        text_features = (tokens.float() * weight).sum(1) / weight.sum(1)
        return (
            F.normalize(self.project_image(image_features.float())),
            F.normalize(self.project_text(text_features)),
        )


class Distillation:
    """Self-distillation with an EMA teacher and SGD or AdamW. A call takes a step and returns its loss.

    The teacher's batch normalisation uses the batch's statistics or, with `teacher.batch_norm="ema"`, its buffers. They
    are the average of the student's. Its texts have no dropout.
    """

    def __init__(self, student: TwoTower, config, compiled: bool):
        self.config, self.student, self.updates = config, student.train(), 0
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.teacher.text.eval()
        self.teacher.image.train(config.teacher.batch_norm == "batch")
        for module in self.teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
        self.average, self.current = averaged_tensors(self.teacher), averaged_tensors(student)
        o = config.optimizer
        sgd = lambda tensors: torch.optim.SGD(tensors, o.learning_rate, o.momentum, fused=True)
        adamw = lambda tensors: torch.optim.AdamW(
            tensors, o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay, fused=True
        )
        self.optimizer = {"sgd": sgd, "adamw": adamw}[o.name](student.parameters())
        self.loss_of = torch.compile(self.loss) if compiled else self.loss

    def loss(self, *batch):
        """½ Σ over both directions of α · cross-entropy with the pair + (1 − α) · with the teacher's soft labels."""
        o = self.config.objective
        with torch.no_grad():
            image, text = self.teacher(*batch)
            teacher_logits = image @ text.T / o.teacher_temperature
        image, text = self.student(*batch)
        similarities = image @ text.T
        pairs = torch.arange(len(similarities), device=similarities.device)
        logit_scale, soft_logit_scale = self.student.log_scales.exp()
        loss = 0.0
        for s, u in ((similarities, teacher_logits), (similarities.T, teacher_logits.T)):
            loss = loss + 0.5 * o.alpha * F.cross_entropy(logit_scale * s, pairs)
            loss = loss + 0.5 * (1.0 - o.alpha) * F.cross_entropy(soft_logit_scale * s, u.softmax(1))
        return loss

    def __call__(self, *batch):
        loss = self.loss_of(*batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        decay = min(self.config.teacher.ema_decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            self.student.log_scales.clamp_(0.0, LARGEST_LOG_SCALE)
            torch._foreach_lerp_(self.average, self.current, 1.0 - decay)
        return loss.detach()


def averaged_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and batch statistics. The other buffers are constants and counts."""
    return [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


def from_numpy(image, text, text_mask, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This project's batch, as `TwoTower` takes it: images [b, s, s, 3] become [b, 3, s, s] in channels-last order."""
    image = torch.from_numpy(image).to(device).permute(0, 3, 1, 2)
    return image, torch.from_numpy(text).long().to(device), torch.from_numpy(text_mask).to(device)
