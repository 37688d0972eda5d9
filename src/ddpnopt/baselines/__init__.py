"""The paper's rivals, with the calling convention of ``torch.optim``."""

from ddpnopt.baselines.ekfac import EKFAC

__all__ = ["EKFAC"]
