"""Several processes must give what one process gives on the same global batch."""

import torch
from distributed_jobs import Toy, batch, plain_loss
from distributed_tools import launch


def test_a_gathered_head_gets_the_gradient_of_one_process(tmp_path):
    toy = Toy()
    loss = plain_loss(toy, *batch())
    loss.backward()
    ranks = launch("gathered", tmp_path)
    assert all(rank["sharded"] for rank in ranks)
    assert abs(sum(rank["loss"] for rank in ranks) / len(ranks) - float(loss.detach())) < 1e-6
    for rank in ranks:
        for name, parameter in toy.named_parameters():
            torch.testing.assert_close(
                torch.tensor(rank["grads"][name]), parameter.grad, rtol=1e-5, atol=1e-6, msg=name
            )
