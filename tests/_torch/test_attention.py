"""Kernels of attention."""

from torch.nn.attention import SDPBackend, sdpa_kernel

from secorder._torch.attention import attention_kernels


def test_the_kernels_of_now() -> None:
    everywhere = attention_kernels()
    assert SDPBackend.MATH in everywhere
    for kernels in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(kernels):
            assert set(attention_kernels()) == set(kernels)
    assert attention_kernels() == everywhere
