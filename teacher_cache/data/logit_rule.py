"""The logit rule: what a model makes of ``head(states)`` before it calls that its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Logits = TypeVar("Logits")
"""(…, V), of numpy or torch."""


@dataclass(frozen=True)
class LogitRule:
    """``logits = scale · head(h)``; then, where there is a cap, ``logits = cap · tanh(logits / cap)``.

    ``scale``: Cohere's ``logit_scale``, or one over Granite's ``logits_scaling`` · ``cap``: Gemma's
    ``final_logit_softcapping`` (arXiv 2408.00118, section 2); 0 is none.
    """

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """What a Transformers configuration says. A rule that it says otherwise is found by ``models.probe``."""
        text = config.get_text_config()
        scale, divisor, cap = (
            getattr(text, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        return cls(float(scale or 1) / float(divisor or 1), float(cap or 0))

    def apply(self, products: Logits) -> Logits:
        """The logits of ``products``, ``states @ head.T``; these themselves where the rule changes nothing."""
        logits: Any = products
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = logits / self.cap
            logits = (np.tanh(logits) if isinstance(logits, np.ndarray) else logits.tanh()) * self.cap
        return logits  # type: ignore[no-any-return]

    def backward(self, gradient: Logits, logits: Logits) -> Logits:
        """The gradient of the products, from that of the ``logits`` which :meth:`apply` gave."""
        inner: Any = gradient
        if self.scale != 1:
            inner = inner * self.scale
        if self.cap:
            inner = inner * (1 - (logits / self.cap) ** 2)  # type: ignore[operator]
        return inner  # type: ignore[no-any-return]


AS_THEY_ARE = LogitRule()
"""Of most models: ``states @ head.T`` are the logits."""
