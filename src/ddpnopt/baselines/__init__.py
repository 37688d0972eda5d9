"""The paper's rivals, with the calling convention of ``torch.optim``."""

from ddpnopt.baselines.ekfac import EKFAC
from ddpnopt.baselines.emsa import EMSA
from ddpnopt.baselines.vanilla_ddp import VanillaDDP

__all__ = ["EKFAC", "EMSA", "VanillaDDP"]
