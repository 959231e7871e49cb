"""The kernels of scaled dot-product attention."""

from torch.backends import cuda
from torch.nn.attention import SDPBackend


def attention_kernels() -> list[SDPBackend]:
    """Those that may be used now."""
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, on in enabled.items() if on]
