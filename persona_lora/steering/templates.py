"""Whether a direction was made with the chat template rendered as it is rendered now.

Knows what runs record of their template; refuses to know weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.loading import ChatModel

logger = logging.getLogger(__name__)

RECORDED = ("chat_template_args", "system_messages")


def warn_of_other_template(
    chat_model: ChatModel, directions: Iterable[LoRADiff | SteeringVector]
) -> None:
    """Log a warning for each direction that was made with other arguments of the chat template.

    A direction of elsewhere, which says nothing of its template, passes.
    """
    now = _rendering(chat_model.record())
    for each in directions:
        made = each.sources.get("training", each.sources.get("model"))
        if isinstance(made, Mapping) and _rendering(made) != now:
            logger.warning(
                "the direction of %s was made with %s, and the model is asked with %s: see "
                "--chat-template-args",
                each.trait or "a trait",
                _rendering(made) or "the chat template as it is",
                now or "the chat template as it is",
            )


def _rendering(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in RECORDED if name in record}
