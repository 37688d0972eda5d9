"""The paper's rivals, with the calling convention of ``torch.optim``."""
