"""The paper's rivals, with the calling convention of ``torch.optim``."""

from ddpnopt.baselines.ekfac import EKFAC
from ddpnopt.baselines.emsa import EMSA

__all__ = ["EKFAC", "EMSA"]
