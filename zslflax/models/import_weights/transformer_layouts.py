"""Layouts of published transformers: of image towers (ViT, DINOv2 and 3, CLIP, SigLIP, EVA-02) and of text encoders.

CLIP's ResNet stands beside its other towers.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from zslflax.models.import_weights.layouts import (
    BESIDE_TRUNK,
    OPEN_CLIP_SHARED,
    OPEN_CLIP_TEXT_TOWER,
    Layout,
    Names,
    clip_resnet,
    expand,
    rename_module,
)

HF_VIT_NAMES = {
    "patch_embed": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "attention/qkv": "attention.attention.{}",
    "attention/out": "attention.output.dense",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "norm": "layernorm",
}
HF_DINOV3_NAMES = {
    "patch_embed": "embeddings.patch_embeddings",
    "cls_token": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "attention/qkv": "attention.{}_proj",
    "attention/q_bias": "attention.q_proj.bias",
    "attention/v_bias": "attention.v_proj.bias",
    "attention/out": "attention.o_proj",
    "mlp/fc1": "mlp.up_proj",
    "mlp/fc2": "mlp.down_proj",
    "layer_scale1/scale": "layer_scale1.lambda1",
    "layer_scale2/scale": "layer_scale2.lambda1",
}
# Of timm's EVAs, where they have other names than its ViTs; in a block.
TIMM_GATED_NAMES = {"mlp/fc1": ("mlp.fc1_g", "mlp.fc1_x")}
TIMM_EVA02_NAMES = TIMM_GATED_NAMES | {
    "attention/qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attention/q_bias": ("attn.q_proj.bias",),
    "attention/v_bias": ("attn.v_proj.bias",),
}
TIMM_DINOV3_NAMES = {"layer_scale1/scale": ("gamma_1",), "layer_scale2/scale": ("gamma_2",)}
CLIP_BLOCK_NAMES = {
    "attention/qkv": "self_attn.{}_proj",
    "attention/out": "self_attn.out_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}
OPEN_CLIP_BLOCK_NAMES = {
    "attention/qkv": "attn.in_proj_",
    "attention/out": "attn.out_proj",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "layer_scale1/scale": "ls_1.gamma",
    "layer_scale2/scale": "ls_2.gamma",
}
CLIP_IMAGE_NAMES = CLIP_BLOCK_NAMES | {
    "patch_embed": "embeddings.patch_embedding",
    "cls_token": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
    "pool/probe": "head.probe",
    "pool/attention/qkv": "head.attention.in_proj_",
    "pool/attention/out": "head.attention.out_proj",
    "pool/norm": "head.layernorm",
    "pool/mlp/fc1": "head.mlp.fc1",
    "pool/mlp/fc2": "head.mlp.fc2",
}
CLIP_TEXT_NAMES = CLIP_BLOCK_NAMES | {
    "word": "embeddings.token_embedding",
    "position": "embeddings.position_embedding",
    "last_norm": "final_layer_norm",
}
OPEN_CLIP_IMAGE_NAMES = OPEN_CLIP_BLOCK_NAMES | {
    "patch_embed": "conv1",
    "cls_token": "class_embedding",
    "position": "positional_embedding",
    "pre_norm": "ln_pre",
    "norm": "ln_post",
    "pool": "attn_pool.attn.in_proj_",
    "pool/query": "attn_pool.query",
    "pool/query_norm": "attn_pool.ln_q",
    "pool/norm": "attn_pool.ln_k",
    "pool/q": "attn_pool.attn.q_proj_",
    "pool/k": "attn_pool.attn.k_proj_",
    "pool/v": "attn_pool.attn.v_proj_",
    "pool/out": "attn_pool.attn.out_proj",
}
OPEN_CLIP_TEXT_NAMES = OPEN_CLIP_BLOCK_NAMES | {
    "word": "token_embedding",
    "position": "positional_embedding=",
    "cls_token": "cls_emb",
    "last_norm": "ln_final",
}
BERT_NAMES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "type": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention/qkv": "attention.self.{}",
    "attention/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
MPNET_NAMES = BERT_NAMES | {
    "distance": "encoder.relative_attention_bias",
    "attention/qkv": "attention.attn.{}",
    "attention/out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}
DISTILBERT_NAMES = BERT_NAMES | {
    "attention/qkv": "attention.{}_lin",
    "attention/out": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "mlp/fc1": "ffn.lin1",
    "mlp/fc2": "ffn.lin2",
    "norm2": "output_layer_norm",
}
MODERNBERT_NAMES = {
    "word": "embeddings.tok_embeddings",
    "norm": "embeddings.norm",
    "attention/qkv": "attn.Wqkv",
    "attention/out": "attn.Wo",
    "norm1": "attn_norm",
    "mlp/fc1": "mlp.Wi",
    "mlp/fc2": "mlp.Wo",
    "norm2": "mlp_norm",
    "last_norm": "final_norm",
}


def timm_vit(path: str) -> Names:
    """Returns timm's name of a ViT's module.

    >>> timm_vit("block_3/attention/qkv"), timm_vit("pool/mlp/fc1"), timm_vit("pool/attention/qkv")
    ('blocks.3.attn.qkv', 'attn_pool.mlp.fc1', ('attn_pool.q', 'attn_pool.kv'))
    """
    if path == "pool/attention/qkv":
        return "attn_pool.q", "attn_pool.kv"
    names = {
        "patch_embed": "patch_embed.proj",
        "position": "pos_embed",
        "pre_norm": "norm_pre",
        "registers": "reg_token",
        "attention/out": "attn.proj",
        "layer_scale1/scale": "ls1.gamma",
        "layer_scale2/scale": "ls2.gamma",
        "pool/probe": "attn_pool.latent",
        "pool/attention/out": "attn_pool.proj",
        "pool/norm": "attn_pool.norm",
        "pool/mlp/fc1": "attn_pool.mlp.fc1",
        "pool/mlp/fc2": "attn_pool.mlp.fc2",
    }
    path = rename_module(path, names).replace("block_", "blocks.")
    return path.replace("attention/", "attn.").replace("/", ".")


def hf_vit(path: str) -> Names:
    """Returns Hugging Face's name of a ViT's module.

    >>> hf_vit("block_3/mlp/fc1")
    'encoder.layer.3.intermediate.dense'
    """
    path = rename_module(path, HF_VIT_NAMES).replace("block_", "encoder.layer.")
    return expand(path.replace("/", "."))


def hf_dinov2(path: str) -> Names:
    """Returns Hugging Face's name of a DINOv2's module.

    >>> hf_dinov2("block_3/mlp/fc1"), hf_dinov2("block_3/layer_scale1/scale")
    ('encoder.layer.3.mlp.fc1', 'encoder.layer.3.layer_scale1.lambda1')
    """
    names = {
        "registers": "embeddings.register_tokens",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
        "layer_scale1/scale": "layer_scale1.lambda1",
        "layer_scale2/scale": "layer_scale2.lambda1",
    }
    path = rename_module(path, HF_VIT_NAMES | names).replace("block_", "encoder.layer.")
    return expand(path.replace("/", "."))


def timm_eva(path: str, names: Mapping[str, tuple[str, ...]]) -> Names:
    """Returns timm's name of a module of an EVA, of which DINOv3 is one there; `names` are those within a block.

    >>> timm_eva("block_3/mlp/fc1", TIMM_GATED_NAMES), timm_eva("block_3/norm1", TIMM_GATED_NAMES)
    (('blocks.3.mlp.fc1_g', 'blocks.3.mlp.fc1_x'), 'blocks.3.norm1')
    """
    block, _, module = path.partition("/")
    if module not in names:
        return timm_vit(path)
    return tuple(f"{block.replace('block_', 'blocks.')}.{name}" for name in names[module])


def hf_dinov3(path: str, gated: bool) -> Names:
    """Returns Hugging Face's name of a DINOv3's module; `gated` is whether its perceptrons are.

    >>> hf_dinov3("block_3/mlp/fc1", gated=True), hf_dinov3("block_3/attention/out", gated=True)
    (('layer.3.mlp.gate_proj', 'layer.3.mlp.up_proj'), 'layer.3.attention.o_proj')
    """
    name = transformer_name(path, HF_DINOV3_NAMES, "layer")
    if gated and isinstance(name, str) and name.endswith("mlp.up_proj"):
        return name.replace("up_proj", "gate_proj"), name
    return name


def transformer_name(path: str, names: Mapping[str, str], layers: str, parts: Sequence[str] = ("q", "k", "v")) -> Names:
    """Returns the published name of a transformer's module.

    >>> transformer_name("layer_3/norm1", BERT_NAMES, "encoder.layer")
    'encoder.layer.3.attention.output.LayerNorm'

    Args:
        path: of the module in the tower.
        names: published name by path, in which a block is left out.
        layers: what precedes the number of a block.
        parts: of the name of an attention's projections.
    """
    path = rename_module(path, names)
    for block in ("block_", "layer_"):
        if path.startswith(block):
            path = f"{layers}.{path.removeprefix(block)}"
    return expand(path.replace("/", "."), parts)


def named(names: Mapping[str, str], layers: str, parts: Sequence[str] = ("q", "k", "v")) -> partial[Names]:
    """Returns `Layout.module` of a transformer; the arguments are those of `transformer_name`."""
    return partial(transformer_name, names=names, layers=layers, parts=parts)


def dinov3_layouts(gated: bool) -> tuple[Layout, ...]:
    """Returns the layouts of DINOv3; `gated` is whether its perceptrons are.

    In timm, the attentions have no biases, or ("qkvb") those of queries and values.
    """
    names = TIMM_DINOV3_NAMES | (TIMM_GATED_NAMES if gated else {})
    timm = Layout("patch_embed.proj.weight", partial(timm_eva, names=names), zeros=r"blocks\.\d+\.attn\.[qv]_bias")
    return timm, Layout("embeddings.patch_embeddings.weight", partial(hf_dinov3, gated=gated))


TIMM_VIT = Layout("patch_embed.proj.weight", timm_vit, BESIDE_TRUNK)
TIMM_EVA02 = Layout("patch_embed.proj.weight", partial(timm_eva, names=TIMM_EVA02_NAMES), BESIDE_TRUNK)
HF_VIT = Layout("embeddings.patch_embeddings.projection.weight", hf_vit)
HF_DINOV2 = Layout("embeddings.patch_embeddings.projection.weight", hf_dinov2)
PROJECTIONS = r"(visual|text)_projection\.weight|logit_(scale|bias)"  # of CLIP and SigLIP
HF_CLIP_IMAGE = Layout(
    "embeddings.patch_embedding.weight", named(CLIP_IMAGE_NAMES, "encoder.layers"), rf"text_model\..+|{PROJECTIONS}"
)
HF_CLIP_TEXT = Layout(
    "embeddings.token_embedding.weight", named(CLIP_TEXT_NAMES, "encoder.layers"), rf"vision_model\..+|{PROJECTIONS}"
)
OPEN_CLIP_IMAGE = Layout(
    "ln_post.weight",
    named(OPEN_CLIP_IMAGE_NAMES, "transformer.resblocks"),
    rf"{OPEN_CLIP_TEXT_TOWER}|(visual\.)?proj|{OPEN_CLIP_SHARED}",
)
OPEN_CLIP_RESNET = Layout(
    "attnpool.positional_embedding",
    clip_resnet,
    rf"{OPEN_CLIP_TEXT_TOWER}|(visual\.)?attnpool\.c_proj\..+|{OPEN_CLIP_SHARED}",
)
OPEN_CLIP_TEXT = Layout(
    "ln_final.weight",
    named(OPEN_CLIP_TEXT_NAMES, "transformer.resblocks"),
    rf"visual\..+|(text\.)?text_projection.*|{OPEN_CLIP_SHARED}",
)
WORDS = "embeddings.word_embeddings.weight"
HF_BERT = Layout(
    WORDS,
    named(BERT_NAMES, "encoder.layer", ("query", "key", "value")),
    rf"visual\..+|text\.proj\..+|{OPEN_CLIP_SHARED}",  # in a model of open_clip
)
TEXT_LAYOUTS = {  # by model_type in config.json; others have those of BERT
    "mpnet": (Layout(WORDS, named(MPNET_NAMES, "encoder.layer")),),
    "distilbert": (Layout(WORDS, named(DISTILBERT_NAMES, "transformer.layer")),),
    "modernbert": (Layout("embeddings.tok_embeddings.weight", named(MODERNBERT_NAMES, "layers")),),
    "clip_text_model": (HF_CLIP_TEXT, OPEN_CLIP_TEXT),
    "siglip_text_model": (HF_CLIP_TEXT, OPEN_CLIP_TEXT),
}
