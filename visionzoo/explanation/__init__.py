"""What models look at: attention, derivatives, features and attributions of single images, as arrays and pictures."""

from visionzoo.explanation.attention import attention_flow, attention_rollout, attention_weights
from visionzoo.explanation.attribution import DeepLift, Faithfulness, deeplift, faithfulness, gradient_input
from visionzoo.explanation.features import FrequencyChannel, attention_iou, feature_colors, frequency_channel
from visionzoo.explanation.image import METHODS, Answer, Explanation, explain_image
from visionzoo.explanation.reach import Reach, attended

__all__ = [
    "METHODS",
    "Answer",
    "DeepLift",
    "Explanation",
    "Faithfulness",
    "FrequencyChannel",
    "Reach",
    "attended",
    "attention_flow",
    "attention_iou",
    "attention_rollout",
    "attention_weights",
    "deeplift",
    "explain_image",
    "faithfulness",
    "feature_colors",
    "frequency_channel",
    "gradient_input",
]
