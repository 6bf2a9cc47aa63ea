"""Which arguments timm's architectures have: what names stand for that are functions in timm 1.0.31.

Those of its classes VisionTransformer, VisionTransformerDistilled (DeiT), SwinTransformer and Hiera, without what is
the class's default, also those with arguments that this program refuses. Made by `python -m
tests.model.formats.timm_models`, and compared with the timm that is installed by tests/model/formats/test_timm.py.
"""

from __future__ import annotations

from model.formats.timm.tables import read_tables

_TABLES = {
    "VisionTransformer": """
aimv2_1b_patch14_224 patch_size=14 embed_dim=2048 depth=24 num_heads=16 class_token=False fc_norm=False mlp_ratio=2.75
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_1b_patch14_336 patch_size=14 embed_dim=2048 depth=24 num_heads=16 class_token=False fc_norm=False mlp_ratio=2.75
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_1b_patch14_448 patch_size=14 embed_dim=2048 depth=24 num_heads=16 class_token=False fc_norm=False mlp_ratio=2.75
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_3b_patch14_224 patch_size=14 embed_dim=3072 depth=24 num_heads=24 class_token=False fc_norm=False
  mlp_ratio=2.6667 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
aimv2_3b_patch14_336 patch_size=14 embed_dim=3072 depth=24 num_heads=24 class_token=False fc_norm=False
  mlp_ratio=2.6667 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
aimv2_3b_patch14_448 patch_size=14 embed_dim=3072 depth=24 num_heads=24 class_token=False fc_norm=False
  mlp_ratio=2.6667 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
aimv2_huge_patch14_224 patch_size=14 embed_dim=1536 depth=24 class_token=False fc_norm=False mlp_ratio=2.6667
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_huge_patch14_336 patch_size=14 embed_dim=1536 depth=24 class_token=False fc_norm=False mlp_ratio=2.6667
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_huge_patch14_448 patch_size=14 embed_dim=1536 depth=24 class_token=False fc_norm=False mlp_ratio=2.6667
  global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm mlp_layer=SwiGLU
  norm_layer=rmsnorm norm_eps=1e-05
aimv2_large_patch14_224 patch_size=14 embed_dim=1024 depth=24 num_heads=8 class_token=False fc_norm=False
  mlp_ratio=2.75 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
aimv2_large_patch14_336 patch_size=14 embed_dim=1024 depth=24 num_heads=8 class_token=False fc_norm=False
  mlp_ratio=2.75 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
aimv2_large_patch14_448 patch_size=14 embed_dim=1024 depth=24 num_heads=8 class_token=False fc_norm=False
  mlp_ratio=2.75 global_pool=avg qkv_bias=False proj_bias=False act_layer=silu embed_norm_layer=RmsNorm
  mlp_layer=SwiGLU norm_layer=rmsnorm norm_eps=1e-05
beit3_base_patch16_224 scale_attn_norm=True scale_mlp_norm=True global_pool=avg norm_eps=1e-05
beit3_giant_patch14_224 patch_size=14 embed_dim=1408 depth=40 num_heads=16 mlp_ratio=4.3637 scale_attn_norm=True
  scale_mlp_norm=True global_pool=avg norm_eps=1e-05
beit3_giant_patch14_336 img_size=336 patch_size=14 embed_dim=1408 depth=40 num_heads=16 mlp_ratio=4.3637
  scale_attn_norm=True scale_mlp_norm=True global_pool=avg norm_eps=1e-05
beit3_large_patch16_224 embed_dim=1024 depth=24 num_heads=16 scale_attn_norm=True scale_mlp_norm=True global_pool=avg
  norm_eps=1e-05
eva_large_patch14_196 patch_size=14 embed_dim=1024 depth=24 num_heads=16 global_pool=avg
eva_large_patch14_336 patch_size=14 embed_dim=1024 depth=24 num_heads=16 global_pool=avg
flexivit_base no_embed_class=True
flexivit_large embed_dim=1024 depth=24 num_heads=16 no_embed_class=True
flexivit_small embed_dim=384 num_heads=6 no_embed_class=True
test_vit embed_dim=64 depth=6 num_heads=2 mlp_ratio=3
test_vit2 embed_dim=64 depth=8 num_heads=2 mlp_ratio=3 class_token=False reg_tokens=1 global_pool=avg
  init_values=1e-05
test_vit3 embed_dim=96 depth=9 num_heads=3 mlp_ratio=2 class_token=False reg_tokens=1 global_pool=map
  pool_include_prefix=True init_values=1e-05
test_vit4 embed_dim=96 depth=9 num_heads=3 mlp_ratio=3 class_token=False reg_tokens=1 global_pool=avg
  init_values=1e-05 norm_layer=rmsnorm
vit_base_patch14_dinov2 patch_size=14 init_values=1e-05
vit_base_patch14_reg1_tipsv2 patch_size=14 init_values=1.0 reg_tokens=1 no_embed_class=True
vit_base_patch14_reg4_dinov2 patch_size=14 init_values=1e-05 reg_tokens=4 no_embed_class=True
vit_base_patch16_18x2_224 depth=18 init_values=1e-05 block_fn=ParallelThingsBlock
vit_base_patch16_224
vit_base_patch16_224_dino
vit_base_patch16_224_in21k
vit_base_patch16_224_miil qkv_bias=False
vit_base_patch16_224_miil_in21k qkv_bias=False
vit_base_patch16_224_sam
vit_base_patch16_384
vit_base_patch16_clip_224 pre_norm=True norm_eps=1e-05
vit_base_patch16_clip_384 pre_norm=True norm_eps=1e-05
vit_base_patch16_clip_quickgelu_224 pre_norm=True act_layer=quick_gelu norm_eps=1e-05
vit_base_patch16_gap_224 num_heads=16 class_token=False global_pool=avg fc_norm=False
vit_base_patch16_plus_240 embed_dim=896 num_heads=14 init_values=1e-05
vit_base_patch16_plus_clip_240 embed_dim=896 num_heads=14 pre_norm=True norm_eps=1e-05
vit_base_patch16_radio_v3 img_size=512 init_values=1e-05 reg_tokens=7 no_embed_class=True final_norm=False
vit_base_patch16_reg4_gap_256 class_token=False no_embed_class=True global_pool=avg reg_tokens=4
vit_base_patch16_rpn_224 qkv_bias=False init_values=1e-05 class_token=False block_fn=ResPostBlock global_pool=avg
vit_base_patch16_siglip_224 class_token=False global_pool=map
vit_base_patch16_siglip_256 class_token=False global_pool=map
vit_base_patch16_siglip_384 class_token=False global_pool=map
vit_base_patch16_siglip_512 class_token=False global_pool=map
vit_base_patch16_siglip_gap_224 class_token=False global_pool=avg fc_norm=False
vit_base_patch16_siglip_gap_256 class_token=False global_pool=avg fc_norm=False
vit_base_patch16_siglip_gap_384 class_token=False global_pool=avg fc_norm=False
vit_base_patch16_siglip_gap_512 class_token=False global_pool=avg fc_norm=False
vit_base_patch16_xp_224 pre_norm=True no_embed_class=True block_fn=ParallelScalingBlock qkv_bias=False qk_norm=True
  norm_layer=rmsnorm
vit_base_patch32_224 patch_size=32
vit_base_patch32_224_clip_laion2b patch_size=32 pre_norm=True norm_eps=1e-05
vit_base_patch32_224_in21k patch_size=32
vit_base_patch32_224_sam patch_size=32
vit_base_patch32_384 patch_size=32
vit_base_patch32_clip_224 patch_size=32 pre_norm=True norm_eps=1e-05
vit_base_patch32_clip_256 patch_size=32 pre_norm=True norm_eps=1e-05
vit_base_patch32_clip_384 patch_size=32 pre_norm=True norm_eps=1e-05
vit_base_patch32_clip_448 patch_size=32 pre_norm=True norm_eps=1e-05
vit_base_patch32_clip_quickgelu_224 patch_size=32 pre_norm=True act_layer=quick_gelu norm_eps=1e-05
vit_base_patch32_plus_256 patch_size=32 embed_dim=896 num_heads=14 init_values=1e-05
vit_base_patch32_siglip_256 patch_size=32 class_token=False global_pool=map act_layer=gelu_tanh
vit_base_patch32_siglip_gap_256 patch_size=32 class_token=False global_pool=avg fc_norm=False act_layer=gelu_tanh
vit_base_patch8_224 patch_size=8
vit_base_patch8_224_dino patch_size=8
vit_base_patch8_224_in21k patch_size=8
vit_betwixt_patch16_gap_256 embed_dim=640 num_heads=10 class_token=False global_pool=avg qkv_bias=False
  init_values=1e-06 fc_norm=False
vit_betwixt_patch16_reg1_gap_256 embed_dim=640 num_heads=10 init_values=1e-05 class_token=False no_embed_class=True
  reg_tokens=1 global_pool=avg
vit_betwixt_patch16_reg4_gap_256 embed_dim=640 num_heads=10 init_values=1e-05 class_token=False no_embed_class=True
  reg_tokens=4 global_pool=avg
vit_betwixt_patch16_reg4_gap_384 embed_dim=640 num_heads=10 init_values=1e-05 class_token=False no_embed_class=True
  reg_tokens=4 global_pool=avg
vit_betwixt_patch32_clip_224 patch_size=32 embed_dim=640 num_heads=10 pre_norm=True norm_eps=1e-05
vit_dlittle_patch16_reg1_gap_256 embed_dim=320 depth=14 num_heads=5 init_values=1e-05 mlp_ratio=5.6 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg attn_layer=diff
vit_dpwee_patch16_reg1_gap_256 embed_dim=256 depth=16 num_heads=4 init_values=1e-05 mlp_ratio=5 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg block_fn=DiffParallelScalingBlock
vit_dwee_patch16_reg1_gap_256 embed_dim=256 depth=14 num_heads=4 init_values=1e-05 mlp_ratio=5 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg attn_layer=diff
vit_giant_patch14_224 patch_size=14 embed_dim=1408 mlp_ratio=4.363636363636363 depth=40 num_heads=16
vit_giant_patch14_224_clip_laion2b patch_size=14 embed_dim=1408 mlp_ratio=4.363636363636363 depth=40 num_heads=16
  pre_norm=True norm_eps=1e-05
vit_giant_patch14_clip_224 patch_size=14 embed_dim=1408 mlp_ratio=4.363636363636363 depth=40 num_heads=16
  pre_norm=True norm_eps=1e-05
vit_giant_patch14_dinov2 patch_size=14 embed_dim=1536 depth=40 num_heads=24 init_values=1e-05 mlp_ratio=5.33334
  mlp_layer=SwiGLUPacked act_layer=silu
vit_giant_patch14_reg1_tipsv2 patch_size=14 embed_dim=1536 depth=40 num_heads=24 init_values=1.0 mlp_ratio=5.33334
  mlp_layer=SwiGLUPacked act_layer=silu reg_tokens=1 no_embed_class=True
vit_giant_patch14_reg4_dinov2 patch_size=14 embed_dim=1536 depth=40 num_heads=24 init_values=1e-05 mlp_ratio=5.33334
  mlp_layer=SwiGLUPacked act_layer=silu reg_tokens=4 no_embed_class=True
vit_giant_patch16_gap_224 embed_dim=1408 depth=40 num_heads=16 mlp_ratio=4.363636363636363 class_token=False
  global_pool=avg fc_norm=False
vit_giant_patch16_radio_v3 img_size=512 embed_dim=1536 depth=40 num_heads=24 reg_tokens=7 no_embed_class=True
  final_norm=False
vit_giantopt_patch16_siglip_256 embed_dim=1536 depth=40 num_heads=16 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_giantopt_patch16_siglip_384 embed_dim=1536 depth=40 num_heads=16 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_giantopt_patch16_siglip_gap_256 embed_dim=1536 depth=40 num_heads=16 class_token=False global_pool=avg
  fc_norm=False act_layer=gelu_tanh
vit_giantopt_patch16_siglip_gap_384 embed_dim=1536 depth=40 num_heads=16 class_token=False global_pool=avg
  fc_norm=False act_layer=gelu_tanh
vit_gigantic_patch14_224 patch_size=14 embed_dim=1664 mlp_ratio=4.923076923076923 depth=48 num_heads=16
vit_gigantic_patch14_clip_224 patch_size=14 embed_dim=1664 mlp_ratio=4.923076923076923 depth=48 num_heads=16
  pre_norm=True norm_eps=1e-05
vit_gigantic_patch14_clip_378 patch_size=14 embed_dim=1664 mlp_ratio=4.923076923076923 depth=48 num_heads=16
  pre_norm=True norm_eps=1e-05
vit_gigantic_patch14_clip_quickgelu_224 patch_size=14 embed_dim=1664 mlp_ratio=4.923076923076923 depth=48 num_heads=16
  pre_norm=True act_layer=quick_gelu norm_eps=1e-05
vit_huge_patch14_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16
vit_huge_patch14_224_clip_laion2b patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True norm_eps=1e-05
vit_huge_patch14_224_in21k patch_size=14 embed_dim=1280 depth=32 num_heads=16
vit_huge_patch14_clip_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True norm_eps=1e-05
vit_huge_patch14_clip_336 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True norm_eps=1e-05
vit_huge_patch14_clip_378 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True norm_eps=1e-05
vit_huge_patch14_clip_quickgelu_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True
  act_layer=quick_gelu norm_eps=1e-05
vit_huge_patch14_clip_quickgelu_378 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True
  act_layer=quick_gelu norm_eps=1e-05
vit_huge_patch14_gap_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16 class_token=False global_pool=avg
  fc_norm=False
vit_huge_patch14_xp_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16 pre_norm=True no_embed_class=True
  block_fn=ParallelScalingBlock qkv_bias=False qk_norm=True norm_layer=rmsnorm
vit_huge_patch16_gap_448 embed_dim=1280 depth=32 num_heads=16 class_token=False global_pool=avg fc_norm=False
vit_huge_patch16_radio_v3 img_size=512 embed_dim=1280 depth=32 num_heads=16 reg_tokens=7 no_embed_class=True
  final_norm=False
vit_huge_patch16_radio_v4 img_size=512 embed_dim=1280 depth=32 num_heads=16 reg_tokens=9 no_embed_class=True
  final_norm=False
vit_intern300m_patch14_448 patch_size=14 embed_dim=1024 depth=24 num_heads=16 init_values=0.1 final_norm=False
vit_large_patch14_224 patch_size=14 embed_dim=1024 depth=24 num_heads=16
vit_large_patch14_224_clip_laion2b patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True norm_eps=1e-05
vit_large_patch14_clip_224 patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True norm_eps=1e-05
vit_large_patch14_clip_336 patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True norm_eps=1e-05
vit_large_patch14_clip_quickgelu_224 patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True
  act_layer=quick_gelu norm_eps=1e-05
vit_large_patch14_clip_quickgelu_336 patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True
  act_layer=quick_gelu norm_eps=1e-05
vit_large_patch14_dinov2 patch_size=14 embed_dim=1024 depth=24 num_heads=16 init_values=1e-05
vit_large_patch14_reg1_tipsv2 patch_size=14 embed_dim=1024 depth=24 num_heads=16 init_values=1.0 reg_tokens=1
  no_embed_class=True
vit_large_patch14_reg4_dinov2 patch_size=14 embed_dim=1024 depth=24 num_heads=16 init_values=1e-05 reg_tokens=4
  no_embed_class=True
vit_large_patch14_xp_224 patch_size=14 embed_dim=1024 depth=24 num_heads=16 pre_norm=True no_embed_class=True
  block_fn=ParallelScalingBlock qkv_bias=False qk_norm=True norm_layer=rmsnorm
vit_large_patch16_224 embed_dim=1024 depth=24 num_heads=16
vit_large_patch16_224_in21k embed_dim=1024 depth=24 num_heads=16
vit_large_patch16_384 embed_dim=1024 depth=24 num_heads=16
vit_large_patch16_radio_v3 img_size=512 embed_dim=1024 depth=24 num_heads=16 init_values=1e-05 reg_tokens=7
  no_embed_class=True final_norm=False
vit_large_patch16_siglip_256 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=map
vit_large_patch16_siglip_384 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=map
vit_large_patch16_siglip_512 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_large_patch16_siglip_gap_256 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=avg fc_norm=False
vit_large_patch16_siglip_gap_384 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=avg fc_norm=False
vit_large_patch16_siglip_gap_512 embed_dim=1024 depth=24 num_heads=16 class_token=False global_pool=avg fc_norm=False
  act_layer=gelu_tanh
vit_large_patch32_224 patch_size=32 embed_dim=1024 depth=24 num_heads=16
vit_large_patch32_224_in21k patch_size=32 embed_dim=1024 depth=24 num_heads=16
vit_large_patch32_384 patch_size=32 embed_dim=1024 depth=24 num_heads=16
vit_little_patch16_reg1_gap_256 embed_dim=320 depth=14 num_heads=5 init_values=1e-05 mlp_ratio=5.6 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg
vit_little_patch16_reg4_gap_256 embed_dim=320 depth=14 num_heads=5 init_values=1e-05 mlp_ratio=5.6 class_token=False
  no_embed_class=True reg_tokens=4 global_pool=avg
vit_medium_patch16_clip_224 embed_dim=512 num_heads=8 pre_norm=True norm_eps=1e-05
vit_medium_patch16_gap_240 embed_dim=512 num_heads=8 class_token=False global_pool=avg qkv_bias=False
  init_values=1e-06 fc_norm=False
vit_medium_patch16_gap_256 embed_dim=512 num_heads=8 class_token=False global_pool=avg qkv_bias=False
  init_values=1e-06 fc_norm=False
vit_medium_patch16_gap_384 embed_dim=512 num_heads=8 class_token=False global_pool=avg qkv_bias=False
  init_values=1e-06 fc_norm=False
vit_medium_patch16_reg1_gap_256 embed_dim=512 num_heads=8 init_values=1e-05 class_token=False no_embed_class=True
  reg_tokens=1 global_pool=avg
vit_medium_patch16_reg4_gap_256 embed_dim=512 num_heads=8 init_values=1e-05 class_token=False no_embed_class=True
  reg_tokens=4 global_pool=avg
vit_medium_patch32_clip_224 patch_size=32 embed_dim=512 num_heads=8 pre_norm=True norm_eps=1e-05
vit_mediumd_patch16_reg4_gap_256 embed_dim=512 depth=20 num_heads=8 init_values=1e-05 class_token=False
  no_embed_class=True reg_tokens=4 global_pool=avg
vit_mediumd_patch16_reg4_gap_384 embed_dim=512 depth=20 num_heads=8 init_values=1e-05 class_token=False
  no_embed_class=True reg_tokens=4 global_pool=avg
vit_pwee_patch16_reg1_gap_256 embed_dim=256 depth=16 num_heads=4 init_values=1e-05 mlp_ratio=5 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg block_fn=ParallelScalingBlock
vit_small_patch14_dinov2 patch_size=14 embed_dim=384 num_heads=6 init_values=1e-05
vit_small_patch14_reg4_dinov2 patch_size=14 embed_dim=384 num_heads=6 init_values=1e-05 reg_tokens=4
  no_embed_class=True
vit_small_patch16_18x2_224 embed_dim=384 depth=18 num_heads=6 init_values=1e-05 block_fn=ParallelThingsBlock
vit_small_patch16_224 embed_dim=384 num_heads=6
vit_small_patch16_224_dino embed_dim=384 num_heads=6
vit_small_patch16_224_in21k embed_dim=384 num_heads=6
vit_small_patch16_36x1_224 embed_dim=384 depth=36 num_heads=6 init_values=1e-05
vit_small_patch16_384 embed_dim=384 num_heads=6
vit_small_patch32_224 patch_size=32 embed_dim=384 num_heads=6
vit_small_patch32_224_in21k patch_size=32 embed_dim=384 num_heads=6
vit_small_patch32_384 patch_size=32 embed_dim=384 num_heads=6
vit_small_patch8_224 patch_size=8 embed_dim=384 num_heads=6
vit_small_patch8_224_dino patch_size=8 embed_dim=384 num_heads=6
vit_so150m2_patch16_reg1_gap_256 embed_dim=832 depth=21 num_heads=13 mlp_ratio=2.6153846153846154 init_values=1e-05
  qkv_bias=False class_token=False reg_tokens=1 global_pool=avg
vit_so150m2_patch16_reg1_gap_384 embed_dim=832 depth=21 num_heads=13 mlp_ratio=2.6153846153846154 init_values=1e-05
  qkv_bias=False class_token=False reg_tokens=1 global_pool=avg
vit_so150m2_patch16_reg1_gap_448 embed_dim=832 depth=21 num_heads=13 mlp_ratio=2.6153846153846154 init_values=1e-05
  qkv_bias=False class_token=False reg_tokens=1 global_pool=avg
vit_so150m_patch16_reg4_gap_256 embed_dim=896 depth=18 num_heads=14 mlp_ratio=2.572 class_token=False reg_tokens=4
  global_pool=avg fc_norm=False
vit_so150m_patch16_reg4_gap_384 embed_dim=896 depth=18 num_heads=14 mlp_ratio=2.572 class_token=False reg_tokens=4
  global_pool=avg fc_norm=False
vit_so150m_patch16_reg4_map_256 embed_dim=896 depth=18 num_heads=14 mlp_ratio=2.572 class_token=False reg_tokens=4
  global_pool=map
vit_so400m_patch14_reg1_tipsv2 patch_size=14 embed_dim=1152 depth=27 num_heads=16 init_values=1.0
  mlp_ratio=3.736111111111111 reg_tokens=1 no_embed_class=True
vit_so400m_patch14_siglip_224 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=map
vit_so400m_patch14_siglip_378 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=map
vit_so400m_patch14_siglip_384 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=map
vit_so400m_patch14_siglip_gap_224 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362
  class_token=False global_pool=avg fc_norm=False
vit_so400m_patch14_siglip_gap_378 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362
  class_token=False global_pool=avg fc_norm=False
vit_so400m_patch14_siglip_gap_384 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362
  class_token=False global_pool=avg fc_norm=False
vit_so400m_patch14_siglip_gap_448 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362
  class_token=False global_pool=avg fc_norm=False
vit_so400m_patch14_siglip_gap_896 patch_size=14 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362
  class_token=False global_pool=avg fc_norm=False
vit_so400m_patch16_radio_v4 img_size=512 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.736111111111111 reg_tokens=9
  no_embed_class=True final_norm=False
vit_so400m_patch16_siglip_256 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_so400m_patch16_siglip_384 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_so400m_patch16_siglip_512 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False global_pool=map
  act_layer=gelu_tanh
vit_so400m_patch16_siglip_gap_256 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=avg fc_norm=False act_layer=gelu_tanh
vit_so400m_patch16_siglip_gap_384 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=avg fc_norm=False act_layer=gelu_tanh
vit_so400m_patch16_siglip_gap_512 embed_dim=1152 depth=27 num_heads=16 mlp_ratio=3.7362 class_token=False
  global_pool=avg fc_norm=False act_layer=gelu_tanh
vit_tiny_patch16_224 embed_dim=192 num_heads=3
vit_tiny_patch16_224_in21k embed_dim=192 num_heads=3
vit_tiny_patch16_384 embed_dim=192 num_heads=3
vit_wee_patch16_reg1_gap_256 embed_dim=256 depth=14 num_heads=4 init_values=1e-05 mlp_ratio=5 class_token=False
  no_embed_class=True reg_tokens=1 global_pool=avg
vit_xsmall_patch16_clip_224 embed_dim=256 depth=10 num_heads=4 pre_norm=True norm_eps=1e-05
deit3_base_patch16_224 no_embed_class=True init_values=1e-06
deit3_base_patch16_224_in21ft1k no_embed_class=True init_values=1e-06
deit3_base_patch16_384 no_embed_class=True init_values=1e-06
deit3_base_patch16_384_in21ft1k no_embed_class=True init_values=1e-06
deit3_huge_patch14_224 patch_size=14 embed_dim=1280 depth=32 num_heads=16 no_embed_class=True init_values=1e-06
deit3_huge_patch14_224_in21ft1k patch_size=14 embed_dim=1280 depth=32 num_heads=16 no_embed_class=True
  init_values=1e-06
deit3_large_patch16_224 embed_dim=1024 depth=24 num_heads=16 no_embed_class=True init_values=1e-06
deit3_large_patch16_224_in21ft1k embed_dim=1024 depth=24 num_heads=16 no_embed_class=True init_values=1e-06
deit3_large_patch16_384 embed_dim=1024 depth=24 num_heads=16 no_embed_class=True init_values=1e-06
deit3_large_patch16_384_in21ft1k embed_dim=1024 depth=24 num_heads=16 no_embed_class=True init_values=1e-06
deit3_medium_patch16_224 embed_dim=512 num_heads=8 no_embed_class=True init_values=1e-06
deit3_medium_patch16_224_in21ft1k embed_dim=512 num_heads=8 no_embed_class=True init_values=1e-06
deit3_small_patch16_224 embed_dim=384 num_heads=6 no_embed_class=True init_values=1e-06
deit3_small_patch16_224_in21ft1k embed_dim=384 num_heads=6 no_embed_class=True init_values=1e-06
deit3_small_patch16_384 embed_dim=384 num_heads=6 no_embed_class=True init_values=1e-06
deit3_small_patch16_384_in21ft1k embed_dim=384 num_heads=6 no_embed_class=True init_values=1e-06
deit_base_patch16_224
deit_base_patch16_384
deit_small_patch16_224 embed_dim=384 num_heads=6
deit_tiny_patch16_224 embed_dim=192 num_heads=3
""",
    "VisionTransformerDistilled": """
deit_base_distilled_patch16_224
deit_base_distilled_patch16_384
deit_small_distilled_patch16_224 embed_dim=384 num_heads=6
deit_tiny_distilled_patch16_224 embed_dim=192 num_heads=3
""",
    "SwinTransformer": """
swin_base_patch4_window12_384 window_size=12 embed_dim=128 depths=(2,2,18,2) num_heads=(4,8,16,32)
swin_base_patch4_window12_384_in22k window_size=12 embed_dim=128 depths=(2,2,18,2) num_heads=(4,8,16,32)
swin_base_patch4_window7_224 embed_dim=128 depths=(2,2,18,2) num_heads=(4,8,16,32)
swin_base_patch4_window7_224_in22k embed_dim=128 depths=(2,2,18,2) num_heads=(4,8,16,32)
swin_large_patch4_window12_384 window_size=12 embed_dim=192 depths=(2,2,18,2) num_heads=(6,12,24,48)
swin_large_patch4_window12_384_in22k window_size=12 embed_dim=192 depths=(2,2,18,2) num_heads=(6,12,24,48)
swin_large_patch4_window7_224 embed_dim=192 depths=(2,2,18,2) num_heads=(6,12,24,48)
swin_large_patch4_window7_224_in22k embed_dim=192 depths=(2,2,18,2) num_heads=(6,12,24,48)
swin_s3_base_224 window_size=(7,7,14,7) depths=(2,2,30,2)
swin_s3_small_224 window_size=(14,14,14,7) depths=(2,2,18,2)
swin_s3_tiny_224 window_size=(7,7,14,7)
swin_small_patch4_window7_224 depths=(2,2,18,2)
swin_tiny_patch4_window7_224
""",
    "Hiera": """
hiera_base_224
hiera_base_abswin_256 abs_win_pos_embed=True init_values=1e-05
hiera_base_plus_224 embed_dim=112 num_heads=2
hiera_huge_224 embed_dim=256 num_heads=4 stages=(2,6,36,4)
hiera_large_224 embed_dim=144 num_heads=2 stages=(2,6,36,4)
hiera_small_224 stages=(1,2,11,2)
hiera_small_abswin_256 stages=(1,2,11,2) abs_win_pos_embed=True global_pos_size=(16,16) init_values=1e-05
  use_expand_proj=False
hiera_tiny_224 stages=(1,2,7,2)
""",
}

ARCHITECTURES = read_tables(_TABLES)
"""By name: of the class, and arguments in the values of `model.formats.timm.arguments`."""
