"""The control of the gate's parameters: Hedgehog with a linear path beside the recurrence that can't gate it.

    out = W_o (y + W_b x + b_b)        W_b = 0 and b_b = 0 at the start

W_b and b_b have the shapes of the gate's W_g and b_g, so the student has as many parameters as one with mixer=gate,
without anything that multiplies.
"""

from torch import nn
from torch.nn import functional as F

from hm.mixer import Mixer, register_mixer


class BypassMixer(Mixer):
    PARTS = {**Mixer.PARTS, "bypass": "bypass"}  # noqa: RUF012

    def __init__(self, spec, layer_idx):
        super().__init__(spec, layer_idx)
        self.bypass = nn.Linear(self.shape.hidden_size, self.q_size)

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.bypass.weight)
        nn.init.zeros_(self.bypass.bias)

    def mix(self, x, rotary, state, keep):
        return super().mix(x, rotary, state, keep) + F.linear(self.bypass(x), self.o_proj.weight)


register_mixer("hedgehog_bypass", BypassMixer)
