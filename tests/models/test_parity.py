"""The models compute what the authors' code computes, to the last digits that float64 has."""

import math
import re

import pytest
import timm
import torch
from golden import Record, relative_error, sample
from torch import nn

import visionzoo
from visionzoo.layers.tokens import Tokens

MODELS = {  # record -> model
    "activator/activator_cifar": "zoo_activator_glu",
    "activator/activator_geglu_cifar": "zoo_activator_geglu",
    "activator/activator_geglu_small": "zoo_activator_geglu",
    "activator/activator_small": "zoo_activator_glu",
    "affnet/affnet": "zoo_affnet",
    "affnet/affnet_et": "zoo_affnet_et",
    "affnet/affnet_et_relu_ln": "zoo_affnet_et",
    "biformer/biformer_tiny": "zoo_biformer_t",
    "biformer/biformer_small": "zoo_biformer_s",
    "convit/convit_base": "zoo_convit_b",
    "convit/convit_options": "zoo_convit_t",
    "convit/convit_small": "zoo_convit_s",
    "convit/convit_tiny": "zoo_convit_t",
    "cpvt/cpvt_base_gap_reconstruction": "zoo_cpvt_b_gap",
    "cpvt/cpvt_small_gap_reconstruction": "zoo_cpvt_s_gap",
    "cpvt/cpvt_tiny_gap_reconstruction": "zoo_cpvt_t_gap",
    "cpvt/pcpvt_base_v0": "zoo_pcpvt_b",
    "cpvt/pcpvt_large_v0": "zoo_pcpvt_l",
    "cpvt/pcpvt_small_v0": "zoo_pcpvt_s",
    "crate/crate_base": "zoo_crate_b",
    "crate/crate_large": "zoo_crate_l",
    "crate/crate_one_head": "zoo_crate_t",
    "crate/crate_options": "zoo_crate_t",
    "crate/crate_small": "zoo_crate_s",
    "crate/crate_tiny": "zoo_crate_t",
    "crossvit/crossvit_15": "zoo_crossvit_15",
    "crossvit/crossvit_15_dagger": "zoo_crossvit_15_dagger",
    "crossvit/crossvit_15_dagger_384": "zoo_crossvit_15_dagger_384",
    "crossvit/crossvit_18": "zoo_crossvit_18",
    "crossvit/crossvit_18_dagger": "zoo_crossvit_18_dagger",
    "crossvit/crossvit_18_dagger_384": "zoo_crossvit_18_dagger_384",
    "crossvit/crossvit_9": "zoo_crossvit_9",
    "crossvit/crossvit_9_dagger": "zoo_crossvit_9_dagger",
    "crossvit/crossvit_base": "zoo_crossvit_b",
    "crossvit/crossvit_options": "zoo_crossvit_t",
    "crossvit/crossvit_small": "zoo_crossvit_s",
    "crossvit/crossvit_tiny": "zoo_crossvit_t",
    "cswin/cswin_t": "zoo_cswin_t",
    "dat/dat_cifar": "zoo_dat_s",
    "dat/dat_options": "zoo_dat_s",
    "dat/dat_readme_32": "zoo_dat_s",
    "davit/davit_overlap": "zoo_davit_t",
    "davit/davit_tiny": "zoo_davit_t",
    "deit/deit_t_distilled": "zoo_deit_t_distilled",
    "ghostnetv2/ghostnetv2_100": "zoo_ghostnetv2_100",
    "ghostnetv2/ghostnetv2_130": "zoo_ghostnetv2_130",
    "ghostnetv2/ghostnetv2_160": "zoo_ghostnetv2_160",
    "ecoformer/alt_gvt_small_ecoformer": "zoo_ecoformer_twins_svt_s",
    "ecoformer/pvt_v2_b0_ecoformer": "zoo_ecoformer_pvtv2_b0",
    "ecoformer/pvt_v2_b0_ecoformer_hash": "zoo_ecoformer_pvtv2_b0",
    "edaformer/eft_b": "zoo_eft_b",
    "edaformer/eft_t": "zoo_eft_t",
    "favit/favit_b0": "zoo_favit_b0",
    "favit/favit_b1": "zoo_favit_b1",
    "favit/favit_b2": "zoo_favit_b2",
    "favit/favit_b3": "zoo_favit_b3",
    "nat/dinat_isotropic": "zoo_isodinat_s",
    "nat/dinat_mini": "zoo_dinat_mini",
    "nat/dinat_mini_padded": "zoo_dinat_mini",
    "nat/dinats_tiny": "zoo_dinats_tiny",
    "nat/nat_mini": "zoo_nat_mini",
    "nat/vitrpb": "zoo_vitrpb_s",
    "ninformer/ninformer_cifar": "zoo_ninformer_cifar",
    "ninformer/ninformer_small": "zoo_ninformer_cifar",
    "l2vit/l2vit_base": "zoo_l2vit_b",
    "l2vit/l2vit_base_384": "zoo_l2vit_b_384",
    "l2vit/l2vit_small": "zoo_l2vit_s",
    "l2vit/l2vit_tiny": "zoo_l2vit_t",
    "iared2/iared2_deit_s": "zoo_iared2_deit_s",
    "iared2/iared2_options": "zoo_iared2_deit_s",
    "inline/inline_cswin_b": "zoo_inline_cswin_b",
    "inline/inline_cswin_b_384": "zoo_inline_cswin_b_384",
    "inline/inline_cswin_s": "zoo_inline_cswin_s",
    "inline/inline_cswin_t": "zoo_inline_cswin_t",
    "inline/inline_deit_b": "zoo_inline_deit_b",
    "inline/inline_deit_s": "zoo_inline_deit_s",
    "inline/inline_deit_t": "zoo_inline_deit_t",
    "inline/inline_pvt_mixed": "zoo_inline_pvt_t",
    "inline/inline_pvt_l": "zoo_inline_pvt_l",
    "inline/inline_pvt_m": "zoo_inline_pvt_m",
    "inline/inline_pvt_s": "zoo_inline_pvt_s",
    "inline/inline_pvt_t": "zoo_inline_pvt_t",
    "inline/inline_swin_b": "zoo_inline_swin_b",
    "inline/inline_swin_b_384": "zoo_inline_swin_b_384",
    "inline/inline_swin_s": "zoo_inline_swin_s",
    "inline/inline_swin_t": "zoo_inline_swin_t",
    "lambda_vit/lambda_small_epoch_0": "zoo_lambda_vit_t_024",
    "lambda_vit/lambda_small_epoch_100": "zoo_lambda_vit_t_024",
    "lambda_vit/lambda_small_epoch_300": "zoo_lambda_vit_t_024",
    "levit/levit_128s": "zoo_levit_128s",
    "litv2/litv2_b": "zoo_litv2_b",
    "litv2/litv2_b_384": "zoo_litv2_b",
    "litv2/litv2_m": "zoo_litv2_m",
    "litv2/litv2_s": "zoo_litv2_s",
    "mega/mega_batchnorm": "zoo_mega_t",
    "mega/mega_layernorm": "zoo_mega_t",
    "mega/mega_scalenorm": "zoo_mega_t",
    "mega/mega_tiny": "zoo_mega_t",
    "memory_vit/memory_vit_options": "zoo_memory_vit_t",
    "memory_vit/memory_vit_tiny": "zoo_memory_vit_t",
    "moh/moh_vit_b_50": "zoo_moh_vit_b_50",
    "moh/moh_vit_s_80": "zoo_moh_vit_s_80",
    "dynperceiver/mobilenetv3_075": "zoo_dynperceiver_mobilenetv3_075",
    "dynperceiver/mobilenetv3_075_other_size": "zoo_dynperceiver_mobilenetv3_075",
    "dynperceiver/regnet_400m": "zoo_dynperceiver_regnet_400m",
    "dynperceiver/regnet_400m_other_size": "zoo_dynperceiver_regnet_400m",
    "dynperceiver/regnet_800m_other_size": "zoo_dynperceiver_regnet_800m",
    "dynperceiver/resnet18_other_size": "zoo_dynperceiver_resnet18",
    "dynperceiver/resnet50_0375": "zoo_dynperceiver_resnet50_0375",
    "dynperceiver/resnet50_0375_other_size": "zoo_dynperceiver_resnet50_0375",
    "gmm/gmm_cait_cifar": "zoo_gmm_cait_tiny",
    "gmm/gmm_cait_small": "zoo_gmm_cait",
    "gmm/gmm_swin_cifar": "zoo_gmm_swin",
    "gmm/gmm_swin_small": "zoo_gmm_swin",
    "gmm/gmm_vit_cifar": "zoo_gmm_vit",
    "gmm/gmm_vit_wide_heads": "zoo_gmm_vit",
    "gmm/gmm_vit_small": "zoo_gmm_vit",
    "halonet/halonet26t": "zoo_halonet_26t",
    "poolformer/metaformer_ppaa": "zoo_metaformer_ppaa_s12",
    "poolformer/poolformer_s12": "zoo_poolformer_s12",
    "shvit/shvit_options": "zoo_shvit_s1",
    "shvit/shvit_s1": "zoo_shvit_s1",
    "spectformer/spectformer_b": "zoo_spectformer_b",
    "spectformer/spectformer_h_l": "zoo_spectformer_h_l",
    "spectformer/spectformer_h_s": "zoo_spectformer_h_s",
    "sparsifiner/sparsifiner_options": "zoo_sparsifiner_s",
    "sparsifiner/sparsifiner_s": "zoo_sparsifiner_s",
    "sparsifiner/sparsifiner_s_pruned": "zoo_sparsifiner_s",
    "spectformer/spectformer_l": "zoo_spectformer_l",
    "spectformer/spectformer_s": "zoo_spectformer_s",
    "spectformer/spectformer_ti": "zoo_spectformer_t",
    "spectformer/spectformer_xs": "zoo_spectformer_xs",
    "stvit/stvit_base": "zoo_stvit_b",
    "stvit/stvit_large": "zoo_stvit_l",
    "stvit/stvit_small": "zoo_stvit_s",
    "ffnet/ffnet_options": "zoo_ffnet_1",
    "ffnet/ffnet_1": "zoo_ffnet_1",
    "ffnet/ffnet_2": "zoo_ffnet_2",
    "ffnet/ffnet_3": "zoo_ffnet_3",
    "ffnet/ffnet_4": "zoo_ffnet_4",
    "flatten/flatten_cswin_mixed": "zoo_flatten_cswin_t",
    "flatten/flatten_cswin_t": "zoo_flatten_cswin_t",
    "flatten/flatten_pvt_mixed": "zoo_flatten_pvt_t",
    "flatten/flatten_pvt_t": "zoo_flatten_pvt_t",
    "flatten/flatten_pvtv2_b0": "zoo_flatten_pvtv2_b0",
    "flatten/flatten_swin_t": "zoo_flatten_swin_t",
    "fcaformer/fcaformer_l1": "zoo_fcaformer_l1",
    "fcaformer/fcaformer_l2": "zoo_fcaformer_l2",
    "fcaformer/fcaformer_l3": "zoo_fcaformer_l3",
    "fcaformer/fcaformer_l4": "zoo_fcaformer_l4",
    "flowformer/flowformer": "zoo_flowformer",
    "flowformer/flowformer_ratios": "zoo_flowformer",
    "flowformer/flowformer_tiny": "zoo_flowformer",
    "pvt/pvt_t": "zoo_pvt_t",
    "pvtv2/pvtv2_b0": "zoo_pvtv2_b0",
    "swin/swin_small_maps": "zoo_swin_t",
    "swin/swin_t": "zoo_swin_t",
    "nystrom_t2t/t2t_nys_7": "zoo_t2t_nystrom_7",
    "nystrom_t2t/t2t_nys_small": "zoo_t2t_nystrom_7",
    "nystrom_t2t/t2t_t_small": "zoo_t2t_nystrom_7",
    "taylorshift/taylorshift_na_direct": "zoo_taylorshift_na",
    "taylorshift/taylorshift_na_efficient": "zoo_taylorshift_na",
    "taylorshift/taylorshift_options": "zoo_taylorshift_ti",
    "taylorshift/taylorshift_pooled": "zoo_taylorshift_ti",
    "tnt/tnt_b": "zoo_tnt_b",
    "tnt/tnt_options": "zoo_tnt_s",
    "tnt/tnt_s": "zoo_tnt_s",
    "transnext/transnext_micro": "zoo_transnext_micro",
    "transnext/transnext_micro_aaaa": "zoo_transnext_micro_aaaa",
}
TOKENS = {  # family whose records hold tokens -> the recorded features, of the states after all blocks and the end
    "activator": lambda states, last: [tokens.x for tokens in states],
    "convit": lambda states, last: [*(states[i].x for i in (0, 9, 11)), last] if len(states) == 12 else [],
    "crate": lambda states, last: [states[i].x for i in (0, len(states) // 2 - 1, -1)],
    "crossvit": lambda states, last: [tokens.map().permute(0, 3, 1, 2) for state in states for tokens in state],
    "gmm": lambda states, last: [states[-1].x if isinstance(states[-1], Tokens) else last.flatten(2).mT],
    "mega": lambda states, last: [states[0].x, states[-1].x, last],
    "ninformer": lambda states, last: [tokens.x for tokens in states],
    "dynperceiver": lambda states, last: [
        *(state.feature for state in states),
        *(latents.x for latents in states[-1].latents),
    ],
    "sparsifiner": lambda states, last: [last[:, 1:]],
    "tnt": lambda states, last: [
        *(t for i in (0, -1) for t in (states[i].pixels.flatten(1, 2), states[i].tokens.x)),
        last,
    ],
    "dat": lambda states, last: [states[0].x, states[-1].x],
    "lambda_vit": lambda states, last: [states[0].x, states[-1].x, last],
    "memory_vit": lambda states, last: [torch.cat([states[-1].reader, states[-1].x], 1)],
    "nystrom_t2t": lambda states, last: [states[-1].x, last],
    "taylorshift": lambda states, last: [*(state.x for state in states), last],
    "flowformer": lambda states, last: [state.flatten(2).mT for state in (*states, last)],
}
_AT_64 = {"img_size": 64, "num_classes": 10}
_FOCUSED = {"type": "focused_linear", "position_size": 14, "lepe_kernel": 3}
_DAT = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 64, "num_heads": 4, "relational_heads": 2}
_DAT["num_classes"] = 100
ACTIVATOR_SMALL = {"num_classes": 7, "depth": 3, "embed_dim": 24, "mlp_ratio": 1.5, "patch_size": 8}
_LAMBDA = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 24, "depth": 4, "mlp_ratio": 3.0}
_T2T = {
    "mlp_ratio": 2.0,
    "img_size": 112,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "token_dim": 16,
    "num_classes": 10,
}
GMM_SMALL = {"num_classes": 7, "img_size": 24, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_kernels": 3}
MEGA_SMALL = {
    "num_classes": 7,
    "img_size": 48,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 16,
    "value_ratio": 1.5,
    "mlp_ratio": 2.5,
    "qk_dim": 6,
    "num_averages": 3,
}
_NAT_ISOTROPIC = {"num_classes": 10, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, "mlp_ratio": 2.0}
SWIN_SMALL = {"embed_dims": (24, 48, 96), "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
OPTIONS = {  # record that is not of a published model -> arguments
    "ffnet/ffnet_options": {
        "depths": (1, 2, 3, 1),
        "embed_dims": (8, 16, 32, 64),
        "stem_dim": 12,
        "mlp_kernels": (7, 3, 9, 5),
        "mixer_kernels": ((7, 3), (3, 7), (9, 7), (5, 9)),
        "mlp_ratios": (2.0, 3.0, 4.0, 2.0),
        "squeeze_excite": (True, False, True, True),
        "act_layers": (nn.ReLU, nn.GELU, nn.ReLU, nn.GELU),
        "layer_scale": 1e-5,
        "layer_norm_last": True,
        "num_classes": 10,
    },
    "flatten/flatten_cswin_mixed": {
        "num_classes": 10,
        "embed_dims": (16, 32, 64, 128),
        "depths": (1, 1, 3, 1),
        "mixers": (
            {"type": "cross_window"},
            None,
            [*[_FOCUSED] * 2, {"type": "cross_window", "stripe_width": 7}],
            None,
        ),
    },
    "flatten/flatten_pvt_mixed": {
        **_AT_64,
        "mixers": (
            {"type": "focused_linear", "position_size": 8, "reduction": 2},
            {"type": "spatial_reduction", "reduction": 4},
            {"type": "focused_linear", "position_size": 4},
            {"type": "spatial_reduction"},
        ),
        "class_token": False,
    },
    "flowformer/flowformer_ratios": {
        **_AT_64,
        "embed_dims": (24, 24, 48, 48),
        "depths": (1, 1, 1, 1),
        "mlp_ratio": (4.0, 3.0, 2.0, 1.5),
    },
    "gmm/gmm_vit_wide_heads": {**GMM_SMALL, "num_kernels": 2, "head_dim": 20},
    "inline/inline_pvt_mixed": {
        **_AT_64,
        "mixers": (
            {"type": "spatial_reduction", "reduction": 8},
            None,
            {"type": "spatial_reduction", "reduction": 2},
            None,
        ),
    },
    "activator/activator_cifar": {"num_classes": 10},
    "activator/activator_geglu_cifar": {"num_classes": 10},
    "activator/activator_geglu_small": ACTIVATOR_SMALL,
    "activator/activator_small": ACTIVATOR_SMALL,
    "affnet/affnet_et_relu_ln": {"norm_layer": "layer_norm", "act_layer": "relu"},
    "inline/inline_deit_b": {"img_size": 64},
    "inline/inline_deit_s": {"img_size": 96},
    "flowformer/flowformer_tiny": {"embed_dims": (24, 48, 96, 192), "depths": (1, 1, 2, 1)},
    "convit/convit_options": {
        "img_size": 48,
        "patch_size": 8,
        "in_chans": 2,
        "num_classes": 7,
        "embed_dim": 24,
        "depth": 3,
        "mlp_ratio": 2.0,
        "qkv_bias": True,
        "local_depth": 1,
        "locality_strength": 0.5,
        "position_table": False,
    },
    "crate/crate_base": {"img_size": 64, "depth": 2},
    "crate/crate_large": {"img_size": 64},
    "crate/crate_one_head": {"num_classes": 10, "img_size": 64, "depth": 2, "embed_dim": 16, "num_heads": 1},
    "crate/crate_options": {
        "num_classes": 10,
        "img_size": (16, 32),
        "patch_size": 8,
        "depth": 4,
        "embed_dim": 24,
        "num_heads": 2,
        "head_dim": 5,
        "step_size": 0.3,
    },
    "crate/crate_small": {"img_size": 64, "depth": 2},
    "crossvit/crossvit_options": {
        "num_classes": 10,
        "img_size": 48,
        "view_ratio": (2, 3),
        "depths": ((2, 1), (1, 3)),
        "embed_dims": (16, 24),
        "num_heads": (2, 3),
        "mlp_ratios": (2.0, 3.0),
        "qkv_bias": False,
        "conv_stem": True,
    },
    "davit/davit_overlap": {
        "depths": (2, 2, 2, 2),
        "embed_dims": (16, 24, 32, 48),
        "num_heads": (1, 2, 2, 4),
        "window_size": 5,
        "mlp_ratio": 2.0,
        "qkv_bias": False,
        "overlap": True,
        "num_classes": 7,
    },
    "deit/deit_t_distilled": {"img_size": 64, "depth": 2},
    "gmm/gmm_cait_cifar": {"num_classes": 10},
    "gmm/gmm_cait_small": {**GMM_SMALL, "class_depth": 3, "head_dim": 5, "mlp_ratio": 1.5},
    "gmm/gmm_swin_cifar": {"num_classes": 10},
    "gmm/gmm_swin_small": {
        "num_classes": 7,
        "embed_dims": (16, 32),
        "depths": (2, 1),
        "num_heads": (2, 4),
        "num_kernels": 3,
    },
    "gmm/gmm_vit_cifar": {"num_classes": 100},
    "gmm/gmm_vit_small": {**GMM_SMALL, "mlp_ratio": 3.0},
    "dat/dat_cifar": {
        **_DAT,
        "num_relations": 4,
        "symmetric_relations": False,
        "symbols": {"type": "symbolic_attention", "num_heads": 4, "num_symbols": 16},
        "mlp": "gelu",
        "mlp_ratio": 2.0,
    },
    "dat/dat_options": {
        **_DAT,
        "depth": 2,
        "embed_dim": 24,
        "num_heads": 3,
        "num_relations": 4,
        "relation_activation": "softmax",
        "symbols": {"type": "relational", "relation_heads": 3, "num_heads": 2, "num_symbols": 5, "causal": False},
        "mlp": "relu",
        "mlp_ratio": 2.0,
        "mlp_bias": False,
        "num_classes": 10,
    },
    "dat/dat_readme_32": {**_DAT, "symbols": {"type": "position_relative", "max_distance": 65}, "mlp_ratio": 2.5},
    "lambda_vit/lambda_small_epoch_0": {**_LAMBDA, "removed": (0, 3), "fading": (1,)},
    "lambda_vit/lambda_small_epoch_100": {**_LAMBDA, "removed": (0,), "fading": (1, 2)},
    "lambda_vit/lambda_small_epoch_300": {**_LAMBDA, "removed": (0,), "fading": (1, 2)},
    "memory_vit/memory_vit_options": {
        "in_chans": 5,
        "img_size": (32, 64),
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "head_dim": 16,
        "mlp_ratio": 1.5,
        "qkv_bias": False,
        "memory_tokens": 10,
        "host_classes": 7,
        "patch_norm": True,
        "norm_eps": 1e-5,
        "num_classes": 2,
    },
    "memory_vit/memory_vit_tiny": {
        "img_size": 64,
        "embed_dim": 96,
        "depth": 4,
        "mlp_ratio": 2.0,
        "qkv_bias": False,
        "memory_tokens": 5,
        "host_classes": 100,
        "patch_norm": True,
        "norm_eps": 1e-5,
        "num_classes": 10,
    },
    "spectformer/spectformer_b": {"img_size": 64},
    "spectformer/spectformer_l": {"img_size": 64},
    "spectformer/spectformer_ti": {"img_size": 96},
    "spectformer/spectformer_xs": {"img_size": 64},
    "mega/mega_batchnorm": {**MEGA_SMALL, "norm_layer": "batch_norm"},
    "mega/mega_layernorm": {**MEGA_SMALL, "hidden_features": 10},
    "mega/mega_scalenorm": {**MEGA_SMALL, "norm_layer": "scale_norm", "position_table": False},
    "ninformer/ninformer_cifar": {"num_classes": 10},
    "ninformer/ninformer_small": {
        "num_classes": 7,
        "depth": 2,
        "embed_dim": 24,
        "mlp_ratio": 1.5,
        "patch_size": 8,
        "img_size": 40,
    },
    "nat/dinat_isotropic": {**_NAT_ISOTROPIC, "kernel_size": 3},
    "nat/vitrpb": {**_NAT_ISOTROPIC, "kernel_size": 6},
    "poolformer/metaformer_ppaa": {"depths": (1, 1, 2, 1), "embed_dims": (8, 16, 32, 64), "img_size": 64},
    "nystrom_t2t/t2t_nys_small": {**_T2T, "qkv_bias": True},
    "nystrom_t2t/t2t_t_small": {**_T2T, "num_landmarks": 0},
    "taylorshift/taylorshift_na_efficient": {"threshold": -1},
    "taylorshift/taylorshift_options": {
        "num_classes": 10,
        "img_size": 80,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 3.0,
        "qkv_bias": False,
        "normalize_input": False,
        "output_normalized": False,
        "conv_embed": True,
        "layer_scale": 0.5,
    },
    "taylorshift/taylorshift_pooled": {
        "num_classes": 10,
        "img_size": (32, 48),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
        "global_pool": "avg",
        "class_position": True,
        "norm_pooled": True,
    },
    "iared2/iared2_options": {
        "num_classes": 10,
        "img_size": 64,
        "embed_dim": 48,
        "num_heads": 3,
        "group_sizes": (1, 2),
    },
    "sparsifiner/sparsifiner_options": {
        "num_classes": 10,
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 4,
        "depth": 4,
        "attn_keep_rate": 0.4,
        "token_keep_rate": 0.5,
        "prune_after": (0, 1),
    },
    "sparsifiner/sparsifiner_s_pruned": {"token_keep_rate": 0.7, "prune_after": (3, 6, 9)},
    "shvit/shvit_options": {
        "embed_dims": (24, 32, 40),
        "partial_dims": (8, 0, 12),
        "qk_dim": (4, 16, 8),
        "depths": (1, 2, 1),
        "num_classes": 10,
        "in_chans": 4,
    },
    "swin/swin_small_maps": {**SWIN_SMALL, "window_size": (4, 4, 2), "num_classes": 10, "mlp_ratio": 2.0},
    "tnt/tnt_options": {
        "num_classes": 10,
        "img_size": (16, 24),
        "patch_size": 8,
        "embed_dim": 24,
        "inner_dim": 12,
        "depth": 2,
        "num_heads": 3,
        "inner_heads": 2,
        "mlp_ratio": 3.0,
        "qkv_bias": True,
        "inner_stride": 3,
        "squeeze_excite": True,
    },
}
_NAT_DENSE = {
    "embed_dims": (8, 16, 32, 64),
    "mlp_ratio": 2.0,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "kernel_size": 3,
    "dilations": ((4,), (1, 3), (2,), (1,)),
}
DENSE = {  # record of the authors' backbone for detection or segmentation -> model, arguments
    "cswin/cswin_t_dense": ("zoo_cswin_t", {}),
    "fcaformer/fcaformer_l1_dense": ("zoo_fcaformer_l1", {}),
    "nat/dinats_dense": ("zoo_dinats_tiny", _NAT_DENSE),
    "nat/nat_dense": ("zoo_nat_mini", _NAT_DENSE),
    "poolformer/poolformer_dense": ("zoo_poolformer_s12", {"depths": (1, 2, 1, 1), "embed_dims": (8, 16, 24, 32)}),
    "pvt/pvt_t_dense": ("zoo_pvt_t", {"class_token": False}),
    "swin/swin_small_maps_dense": ("zoo_swin_t", {**SWIN_SMALL, "unshifted": "none"}),
    "swin/swin_t_dense": ("zoo_swin_t", {}),
    "transnext/transnext_dense": (
        "zoo_transnext_micro",
        {
            "depths": (1, 1, 2, 1),
            "embed_dims": (24, 48, 48, 72),
            "num_heads": (1, 2, 2, 3),
            "img_size": 96,
            "pretrain_size": 64,
            "interpolate_bias": True,
        },
    ),
}


def _has_smaller(name, record):
    """Whether a smaller record stands for this one: of another variant, or of smaller images."""
    small = f"{name}_other_size" in MODELS
    return small or (record.meta["num_params"] > 2e7 and not name.endswith("_other_size"))


RUNS = [
    pytest.param(name, stress, marks=[pytest.mark.full] if _has_smaller(name, record) else [])
    for name in MODELS
    for record in [Record(name)]
    for stress in ((False, True) if "stress" in record.meta else (False,))
]


def _features(model, record):
    """Return what the head takes, and the features that are in the record."""
    if record.meta["name"].endswith("gap_reconstruction"):  # the first is that before the position generator
        before = []
        model.blocks[0].peg.register_forward_pre_hook(lambda module, args: before.append(args[0].permute(0, 3, 1, 2)))
        last, features = model.forward_intermediates(record.image(), [5, 11])
        return last, before + features
    if record.meta["file"] == "vanilla_architecture/spectformer.py":
        return model.forward_intermediates(record.image(), 1)
    if record.meta["family"] == "fcaformer":  # the stem's map, then layers that end with what our stages begin with
        taps = []
        for module in (model.stem, *(stage.downsample for stage in model.stages[1:])):
            module.register_forward_hook(lambda module, args, out: taps.append(out))
        last = model.forward_features(record.image())
        maps = [out.permute(0, 3, 1, 2) for out in taps[1:]]
        return last, [taps[0], *maps[:2], *(x.flatten(2).mT for x in (maps[2], last))]
    if record.meta["family"] == "iared2":  # the agents' probabilities of all tokens, 0 for those that are gone
        said = []
        for reducer in (block.reducer for block in model.blocks if block.reducer is not None):
            reducer.masked = True
            reducer.register_forward_pre_hook(lambda reducer, args: said.append(_probabilities(reducer, *args)))
        return model.forward_features(record.image()), said
    if record.meta["family"] not in TOKENS:
        return model.forward_intermediates(record.image())
    states = [model.begin(record.image())]
    for i in range(len(model.parts)):
        states.append(model.advance(i, states[-1]))
    last = model.finish(states[-1])
    return last, TOKENS[record.meta["family"]](states[1:], last)


def _exits(model, record):
    """Return what the classifiers inside the model say."""
    state, said = model.begin(record.image()), {}
    for i in range(len(model.parts) if model.exit_places() else 0):
        state = model.advance(i, state)
        said |= {f"exit_{name}": model.classify(name, state) for name, part in model.exit_places().items() if part == i}
    return said


def _probabilities(reducer, x, source, keep, *_):
    probabilities = reducer.probabilities(x)
    return probabilities if keep is None else probabilities * torch.nn.functional.pad(keep, (1, 0), value=True)


def compared(record_name, stress=False):
    """Run a model on its record's weights and image; yield each recorded array's key, our value and the array."""
    record = Record(record_name)
    model = timm.create_model(MODELS[record_name], **OPTIONS.get(record_name, {})).double().eval()
    visionzoo.load_weights(model, record.state_dict(stress))
    if record.meta["family"] == "lambda_vit":
        model.set_epoch(int(record.meta["name"].rpartition("_")[2]))
    with torch.no_grad():
        last, features = _features(model, record)
        out = {"logits": model.forward_head(last), **{f"feat{i}": feature for i, feature in enumerate(features)}}
        if record.meta["family"] == "memory_vit":
            out["vit_logits"] = model.forward_tasks(record.image())[1]
        out |= _exits(model, record)
        if getattr(model.head, "distilled", False):  # the heads' training mode, with norms in theirs for inference
            model.head.training = model.head.distilled_training = True
            out["logits_head"], out["logits_head_dist"] = model.forward_head(last)
    prefix = "stress_" if stress else ""
    for key, array in record.arrays.items():
        if key.startswith("stress_") == stress and not key.startswith("state:"):
            value = out[key.removeprefix(prefix)]
            yield key, sample(value) if "feat" in key else value, array


@pytest.mark.parametrize(("record_name", "stress"), RUNS)
def test_logits_and_features_are_the_authors(record_name, stress):
    record, keys = Record(record_name), []
    for key, value, array in compared(record_name, stress):
        assert relative_error(value, array) <= record.tolerance(array.dtype == "float32"), key
        keys.append(key)
    assert f"{'stress_' if stress else ''}logits" in keys


@pytest.mark.parametrize("record_name", DENSE)
def test_maps_of_any_size_are_those_of_the_authors_dense_backbone(record_name):
    record = Record(record_name)
    name, kwargs = DENSE[record_name]
    model = timm.create_model(name, features_only=True, **kwargs).double().eval()
    visionzoo.load_weights(model, record.state_dict())
    with torch.no_grad():
        features = model(record.image())
    assert len(features) == len(record.arrays)
    for i, feature in enumerate(features):
        assert relative_error(sample(feature), record.arrays[f"feat{i}"]) <= record.tolerance()


def test_layers_behind_the_maps_of_the_authors_detectors_are_left_out():
    model = timm.create_model("zoo_fcaformer_l1", features_only=True)
    state = Record("fcaformer/fcaformer_l1_dense").state_dict()
    for i, (dim, out_dim) in enumerate(zip((64, 128, 192, 320), (96, 192, 384, 768), strict=True)):
        state[f"head{i}.weight"] = torch.zeros(out_dim, dim, 1, 1)
        state |= {f"norm{i}.{name}": torch.zeros(out_dim) for name in ("weight", "bias")}
    report = visionzoo.load_weights(model, {f"backbone.{name}": value for name, value in state.items()})
    assert (report.names, report.missing, report.unexpected) == ("authors", [], [])
    behind = [f"{layer}{i}.{name}" for i in range(4) for layer in ("head", "norm") for name in ("weight", "bias")]
    assert sorted(report.unused) == sorted(name for name in behind if not re.match(r"head.\.bias", name))
    assert "12 unused: head0.weight, " in str(report)


@pytest.mark.parametrize(
    ("record_name", "model", "norm"),
    [
        ("biformer/biformer_tiny", "zoo_biformer_t", "extra_norms.0"),
        ("cswin/cswin_t_dense", "zoo_cswin_t", "norm1"),
        ("davit/davit_tiny", "zoo_davit_t", "norm0"),
    ],
)
def test_norms_of_the_authors_dense_maps_are_left_out(record_name, model, norm):
    norms = {f"{norm}.{name}": torch.zeros(64) for name in ("weight", "bias")}
    report = visionzoo.load_weights(
        timm.create_model(model, features_only=True), {**Record(record_name).state_dict(), **norms}
    )
    assert (report.names, report.missing, report.unexpected) == ("authors", [], []) and norms.keys() <= {*report.unused}


@pytest.mark.parametrize("record_name", MODELS)
def test_parameter_count_is_the_authors(record_name):
    with torch.device("meta"):
        model = timm.create_model(MODELS[record_name], **OPTIONS.get(record_name, {}))
    meta = Record(record_name).meta
    unused = sum(math.prod(shape) for name, shape, _ in meta["state"] if name in meta.get("unused_parameters", ()))
    unused += sum(math.prod(shape) // 3 for name, shape, _ in meta["state"] if ".agent.qk." in name)  # IA-RED2's third
    removed = [
        f"blocks.{i}.{part}." for i in OPTIONS.get(record_name, {}).get("removed", ()) for part in ("norm1", "attn")
    ]
    unused += sum(
        math.prod(shape) for name, shape, _ in meta["state"] if name.startswith(tuple(removed))
    )  # times 0 there
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"] - unused


@pytest.mark.parametrize(
    ("broken", "replacement"),
    [("eps", 1e-5), ("scale", 32**-0.5)],
)
def test_parity_would_notice_a_small_mistake(broken, replacement):
    """A LayerNorm eps of 1e-5 for 1e-6, or the usual scale of attention for the released one, must not pass."""
    record = Record("biformer/biformer_tiny")
    model = timm.create_model("zoo_biformer_t").double().eval()
    visionzoo.load_weights(model, record.state_dict())
    block = model.stages[1].blocks[1]
    setattr(block.norm1 if broken == "eps" else block.mixer, broken, replacement)
    with torch.no_grad():
        error = relative_error(model(record.image()).numpy(), record.arrays["logits"])
    assert error > 10 * record.tolerance()
