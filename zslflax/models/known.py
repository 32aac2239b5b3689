"""The towers and models that there are, with their sizes and where their weights are published."""

from typing import NamedTuple


class Known(NamedTuple):
    """A tower, an encoder or a whole model.

    Attributes:
        name: of an image tower, `model.image.name`; else what it is called.
        millions: of parameters.
        hub_ids: ids on the Hugging Face Hub. Their architectures, layouts and options are those that the tests compare
            with the original implementation; "(convert)" marks those that are published in PyTorch's format alone.
    """

    name: str
    millions: float
    hub_ids: tuple[str, ...] = ()


IMAGE_TOWERS = (
    Known("resnet18", 11.2, ("microsoft/resnet-18", "timm/resnet18.tv_in1k")),
    Known("resnet34", 21.3, ("microsoft/resnet-34", "timm/resnet34.tv_in1k")),
    Known("resnet50", 23.5, ("microsoft/resnet-50", "timm/resnet50.tv_in1k", "timm/resnet50.fb_swsl_ig1b_ft_in1k")),
    Known("resnet101", 42.5, ("microsoft/resnet-101", "timm/resnet101.tv_in1k")),
    Known("resnet12", 12.4),
    Known("resnet_nano", 0.3),
    Known("resnet18d", 11.2, ("timm/resnet18d.ra2_in1k",)),
    Known("resnet34d", 21.3, ("timm/resnet34d.ra2_in1k",)),
    Known("resnet50d", 23.5, ("timm/resnet50d.ra2_in1k",)),
    Known("resnet101d", 42.5, ("timm/resnet101d.ra2_in1k",)),
    Known("convnext_tiny", 27.8, ("facebook/convnext-tiny-224", "timm/convnext_tiny.fb_in22k")),
    Known("convnext_small", 49.5, ("facebook/convnext-small-224", "timm/convnext_small.fb_in22k")),
    Known("convnext_base", 87.6, ("facebook/convnext-base-224", "timm/convnext_base.fb_in22k")),
    Known("convnext_large", 196.2, ("facebook/convnext-large-224", "timm/convnext_large.fb_in22k")),
    Known("convnext_xlarge", 348.1, ("facebook/convnext-xlarge-224-22k", "timm/convnext_xlarge.fb_in22k")),
    Known("convnext_xxlarge", 843.4, ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg",)),
    Known("mobilenet_v2", 2.2, ("timm/mobilenetv2_100.ra_in1k",)),
    Known("efficientnet_lite0", 3.4, ("timm/tf_efficientnet_lite0.in1k",)),
    Known("efficientnet_lite1", 4.1, ("timm/tf_efficientnet_lite1.in1k",)),
    Known("efficientnet_lite2", 4.8, ("timm/tf_efficientnet_lite2.in1k",)),
    Known("efficientnet_lite3", 6.9, ("timm/tf_efficientnet_lite3.in1k",)),
    Known("efficientnet_lite4", 11.7, ("timm/tf_efficientnet_lite4.in1k",)),
    Known("fastvit_t8", 3.3, ("timm/fastvit_t8.apple_in1k",)),
    Known("fastvit_t12", 6.5, ("timm/fastvit_t12.apple_in1k",)),
    Known("fastvit_s12", 8.4, ("timm/fastvit_s12.apple_in1k",)),
    Known("fastvit_sa12", 10.6, ("timm/fastvit_sa12.apple_in1k",)),
    Known("fastvit_sa24", 20.5, ("timm/fastvit_sa24.apple_in1k",)),
    Known("fastvit_sa36", 30.5, ("timm/fastvit_sa36.apple_in1k",)),
    Known("fastvit_ma36", 42.9, ("timm/fastvit_ma36.apple_in1k",)),
    Known("fastvit_mci0", 10.9, ("timm/fastvit_mci0.apple_mclip2_dfndr2b",)),
    Known("fastvit_mci1", 21.0),
    Known("fastvit_mci2", 35.2, ("timm/fastvit_mci2.apple_mclip2_dfndr2b",)),
    Known("fastvit_mci3", 122.9, ("timm/fastvit_mci3.apple_mclip2_dfndr2b",)),
    Known("fastvit_mci4", 318.6, ("timm/fastvit_mci4.apple_mclip2_dfndr2b",)),
    Known("vit_nano4", 0.8),
    Known("vit_ti16", 5.5, ("timm/vit_tiny_patch16_224.augreg_in21k",)),
    Known("vit_s16", 21.7, ("timm/vit_small_patch16_224.augreg_in21k",)),
    Known("vit_b16", 85.8, ("google/vit-base-patch16-224-in21k", "timm/vit_base_patch16_224.augreg_in21k")),
    Known("vit_b32", 87.5, ("google/vit-base-patch32-224-in21k", "timm/vit_base_patch32_224.augreg_in21k")),
    Known("dinov2_s14", 22.1, ("facebook/dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m")),
    Known("dinov2_b14", 86.6, ("facebook/dinov2-base", "timm/vit_base_patch14_dinov2.lvd142m")),
    Known("dinov2_l14", 304.4, ("facebook/dinov2-large", "timm/vit_large_patch14_dinov2.lvd142m")),
    Known("dinov2_s14_reg", 22.1, ("facebook/dinov2-with-registers-small",)),
    Known("dinov2_b14_reg", 86.6, ("facebook/dinov2-with-registers-base",)),
    Known("dinov2_l14_reg", 304.4, ("facebook/dinov2-with-registers-large",)),
    Known("dinov3_s16", 21.6, ("facebook/dinov3-vits16-pretrain-lvd1689m", "timm/vit_small_patch16_dinov3.lvd1689m")),
    Known("dinov3_s16_plus", 28.7, ("timm/vit_small_plus_patch16_dinov3.lvd1689m",)),
    Known("dinov3_b16", 85.7, ("timm/vit_base_patch16_dinov3.lvd1689m",)),
    Known("dinov3_l16", 303.1, ("timm/vit_large_patch16_dinov3.lvd1689m",)),
    Known("dinov3_h16_plus", 840.6, ("timm/vit_huge_plus_patch16_dinov3.lvd1689m",)),
)

TEXT_ENCODERS = (
    Known("MiniLM (BERT)", 22.6, ("sentence-transformers/all-MiniLM-L6-v2",)),
    Known("BGE small (BERT)", 33.2, ("BAAI/bge-small-en-v1.5",)),
    Known("BGE base (BERT)", 109.0, ("BAAI/bge-base-en-v1.5",)),
    Known("E5 base (BERT)", 109.0, ("intfloat/e5-base-v2",)),
    Known("GTE base (BERT)", 109.0, ("thenlper/gte-base",)),
    Known("DeCLUTR (RoBERTa)", 124.0, ("johngiorgi/declutr-base (convert)", "johngiorgi/declutr-sci-base (convert)")),
    Known("E5 multilingual (XLM-R)", 277.0, ("intfloat/multilingual-e5-base",)),
    Known("CamemBERT", 110.0, ("dangvantuan/sentence-camembert-base",)),
    Known("MPNet", 109.0, ("sentence-transformers/all-mpnet-base-v2",)),
    Known("DistilBERT", 66.0, ("sentence-transformers/multi-qa-distilbert-cos-v1",)),
    Known("ModernBERT", 149.0, ("nomic-ai/modernbert-embed-base", "Alibaba-NLP/gte-modernbert-base")),
)

TWO_TOWER_MODELS = (
    Known("CLIP ViT-B/32", 151.3, ("openai/clip-vit-base-patch32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K")),
    Known("CLIP ViT-B/16", 149.6, ("openai/clip-vit-base-patch16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K")),
    Known("CLIP ViT-L/14", 427.6, ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K")),
    Known("CLIP ViT-L/14, 336 pixels", 427.9, ("openai/clip-vit-large-patch14-336",)),
    Known("CLIP ResNet-50", 102.0, ("timm/resnet50_clip.openai", "timm/resnet50_clip.yfcc15m")),
    Known("CLIP ResNet-101", 119.7, ("timm/resnet101_clip.openai", "timm/resnet101_clip.yfcc15m")),
    Known("CLIP ResNet-50x4, 288 pixels", 178.3, ("timm/resnet50x4_clip.openai",)),
    Known("CLIP ResNet-50x16, 384 pixels", 291.0, ("timm/resnet50x16_clip.openai",)),
    Known("CLIP ResNet-50x64, 448 pixels", 623.3, ("timm/resnet50x64_clip.openai",)),
    Known("CLIP ConvNeXt base", 151.5, ("laion/CLIP-convnext_base-laion400M-s13B-b51K",)),
    Known("CLIP ConvNeXt base, wide, 256 pixels", 179.4, ("laion/CLIP-convnext_base_w-laion2B-s13B-b82K",)),
    Known("CLIP ConvNeXt large, 256 pixels", 351.8, ("laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg",)),
    Known("CLIP ConvNeXt xxlarge, 256 pixels", 1200.6, ("laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg",)),
    Known("CLIP ViT-B/32, RoBERTa", 212.7, ("laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k",)),
    Known("CLIP ViT-B/32, XLM-R", 366.1, ("laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k",)),
    Known("CLIP ViT-H/14, XLM-R large", 1193.0, ("laion/CLIP-ViT-H-14-frozen-xlm-roberta-large-laion5B-s13B-b90k",)),
    Known("BiomedCLIP", 195.9, ("microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 (convert)",)),
    Known("MobileCLIP2 S0", 74.8, ("timm/MobileCLIP2-S0-OpenCLIP",)),
    Known("MobileCLIP S1", 85.0, ("apple/MobileCLIP-S1-OpenCLIP",)),
    Known("MobileCLIP S2, MobileCLIP2 S2", 99.2, ("apple/MobileCLIP-S2-OpenCLIP", "timm/MobileCLIP2-S2-OpenCLIP")),
    Known("MobileCLIP2 S3", 248.9, ("timm/MobileCLIP2-S3-OpenCLIP",)),
    Known("MobileCLIP2 S4", 445.4, ("timm/MobileCLIP2-S4-OpenCLIP",)),
    Known("MobileCLIP2 L/14", 427.6, ("timm/MobileCLIP2-L-14-OpenCLIP",)),
    Known(
        "CoCa ViT-B/32",
        152.5,
        ("laion/CoCa-ViT-B-32-laion2B-s13B-b90k", "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k"),
    ),
    Known(
        "CoCa ViT-L/14",
        430.2,
        ("laion/CoCa-ViT-L-14-laion2B-s13B-b90k", "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"),
    ),
    Known("CLIPA L/14", 414.2, ("UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B",)),
    Known("CLIPA L/14, 336 pixels", 414.5, ("UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B",)),
    Known("CLIPA H/14", 968.2, ("UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B",)),
    Known(
        "CLIPA H/14, 336 pixels",
        968.6,
        ("UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B", "UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B"),
    ),
    Known("CLIPA bigG/14", 2517.2, ("UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B",)),
    Known("CLIPA bigG/14, 336 pixels", 2517.8, ("UCSC-VLAA/ViT-bigG-14-CLIPA-336-datacomp1B",)),
    Known("EVA-CLIP g/14", 1136.4, ("timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k",)),
    Known("EVA-CLIP g/14 plus", 1366.6, ("timm/eva_giant_patch14_plus_clip_224.merged2b_s11b_b114k",)),
    Known("EVA-02-CLIP B/16", 149.7, ("timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",)),
    Known("EVA-02-CLIP L/14", 427.8, ("timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k",)),
    Known("EVA-02-CLIP L/14, 336 pixels", 428.1, ("timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",)),
    Known("PE-Core T/16, 384 pixels", 69.5, ("timm/PE-Core-T-16-384",)),
    Known("PE-Core S/16, 384 pixels", 87.2, ("timm/PE-Core-S-16-384",)),
    Known("PE-Core B/16", 447.7, ("timm/PE-Core-B-16",)),
    Known("PE-Core L/14, 336 pixels", 671.1, ("timm/PE-Core-L-14-336",)),
    Known("PE-Core G/14, 448 pixels", 2419.3, ("timm/PE-Core-bigG-14-448",)),
    Known("SigLIP B/16", 203.2, ("google/siglip-base-patch16-224", "timm/ViT-B-16-SigLIP")),
    Known("SigLIP L/16, 256 pixels", 652.2, ("google/siglip-large-patch16-256", "timm/ViT-L-16-SigLIP-256")),
    Known("SigLIP So400m/14, 384 pixels", 878.0, ("google/siglip-so400m-patch14-384", "timm/ViT-SO400M-14-SigLIP-384")),
    Known("SigLIP 2 B/32, 256 pixels", 376.9, ("google/siglip2-base-patch32-256", "timm/ViT-B-32-SigLIP2-256")),
    Known("SigLIP 2 B/16", 375.2, ("google/siglip2-base-patch16-224", "timm/ViT-B-16-SigLIP2")),
    Known("SigLIP 2 L/16, 256 pixels", 881.5, ("google/siglip2-large-patch16-256", "timm/ViT-L-16-SigLIP2-256")),
    Known("SigLIP 2 So400m/14", 1135.5, ("google/siglip2-so400m-patch14-224", "timm/ViT-SO400M-14-SigLIP2")),
    Known(
        "SigLIP 2 gopt/16, 256 pixels", 1871.4, ("google/siglip2-giant-opt-patch16-256", "timm/ViT-gopt-16-SigLIP2-256")
    ),
)
