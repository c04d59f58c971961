from __future__ import annotations

import pytest
import torch

from msvq_fast.models import from_preset
from msvq_fast.nn import VectorQuantizer
from msvq_fast.nn.rotation import rotate_to
from msvq_fast.ops import InputError


def rotation(a, b):
    """The matrix that turns the direction of ``a`` into that of ``b`` in their plane."""
    a, b = a / a.norm(), b / b.norm()
    side = b - (a @ b) * a
    sine = side.norm()
    side = side / sine
    plane = torch.stack([a, side], dim=1)  # (D, 2)
    turn = torch.tensor([[a @ b, -sine], [sine, a @ b]], dtype=a.dtype)
    return torch.eye(len(a), dtype=a.dtype) + plane @ (turn - torch.eye(2)) @ plane.T


def test_gradient_is_turned_and_scaled_by_what_takes_z_to_its_code() -> None:
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    z_q, upstream = torch.randn(2, 5, 4, dtype=torch.float64)
    out = rotate_to(z, z_q, dim=1)
    assert torch.equal(out, z_q)
    out.backward(upstream)
    for i in range(5):
        matrix = rotation(z[i].detach(), z_q[i]) * z_q[i].norm() / z[i].detach().norm()
        torch.testing.assert_close(matrix @ z[i].detach(), z_q[i])
        torch.testing.assert_close(z.grad[i], matrix.T @ upstream[i])


def test_angle_between_gradient_and_vector_is_kept() -> None:
    z = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    z_q, upstream = torch.randn(2, 20, 6, dtype=torch.float64)
    rotate_to(z, z_q, dim=-1).backward(upstream)
    cosine = torch.cosine_similarity
    torch.testing.assert_close(cosine(z.grad, z.detach()), cosine(upstream, z_q))


def test_layouts_and_low_precision() -> None:
    z, z_q, upstream = torch.randn(3, 2, 4, 3, 5)
    rows = [t.movedim(1, -1).contiguous() for t in (z, z_q, upstream)]
    a, b = z.clone().requires_grad_(), rows[0].clone().requires_grad_()
    rotate_to(a, z_q, dim=1).backward(upstream)
    rotate_to(b, rows[1], dim=-1).backward(rows[2])
    torch.testing.assert_close(a.grad.movedim(1, -1), b.grad)
    half = z.bfloat16().requires_grad_()
    rotate_to(half, z_q.bfloat16(), dim=1).backward(upstream.bfloat16())
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.grad.float(), a.grad, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("case", ["zero z", "zero code", "opposite"])
def test_no_rotation_no_harm(case) -> None:
    z = torch.tensor([[1.0, 2.0, 0.0]])
    z_q = {"zero z": z, "zero code": z * 0, "opposite": -z}[case]
    z = (z * 0 if case == "zero z" else z).requires_grad_()
    upstream = torch.tensor([[0.3, -0.1, 0.7]])
    rotate_to(z, z_q, dim=1).backward(upstream)
    if case == "zero code":
        # Its length is nought, and so is what the gradient is scaled by, unless undefined.
        assert z.grad.isfinite().all()
    else:
        assert torch.equal(z.grad, upstream)


def test_quantizer_turns_the_reconstruction_gradient_alone() -> None:
    torch.manual_seed(1)
    quantizer = VectorQuantizer(8, 4, gradient="rotation")
    same = VectorQuantizer(8, 4)
    same.load_state_dict(quantizer.state_dict())
    z = torch.randn(2, 4, 5, 6, requires_grad=True)
    out, straight = quantizer(z), same(z)
    assert torch.equal(out.z_q, straight.z_q) and torch.equal(out.codes, straight.codes)
    assert torch.equal(quantizer.codebook, same.codebook)
    upstream = torch.randn_like(z)
    (turned,) = torch.autograd.grad((out.z_q * upstream).sum() + out.commitment_loss, z)
    commitment = torch.autograd.grad(straight.commitment_loss, z, retain_graph=True)[0]
    w = z.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad((rotate_to(w, out.z_q, dim=1) * upstream).sum(), w)
    torch.testing.assert_close(turned, want + commitment)
    assert not torch.allclose(turned, upstream + commitment)


def test_models_learn_with_it_and_keep_it(tmp_path) -> None:
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    model = from_preset("tiny", width=8, num_residual_blocks=1, gradient="rotation")
    loss = model(x).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.gradient == "rotation"
    with pytest.raises(InputError, match="gradient='reinmax'; expected one of"):
        from_preset("tiny", gradient="reinmax")
    with pytest.raises(InputError, match="gradient='reinmax'; expected one of"):
        VectorQuantizer(8, 4, gradient="reinmax")
