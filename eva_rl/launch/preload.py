"""What a fine-tuning run imports, for the process that runs are forked from; nothing of it touches a device."""

import h5py  # noqa: F401
import metaworld  # noqa: F401
import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.stats  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import eva_rl.finetune.command
import eva_rl.finetune.phases  # noqa: F401
