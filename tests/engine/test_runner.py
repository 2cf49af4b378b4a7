"""The orders of one action are dispatched in turn, and transfers of some layers right behind these."""

from pdjax.engine.runner import dispatch_in_turn
from pdjax.serving.orders import StepOrder, TransferOrder
from pdjax.types.span import Span


def transfer(number: int, layers: tuple[int, int] | None) -> TransferOrder:
  return TransferOrder(number, 'r', 'prefill0', 'decode0', Span((0,), (0,), 0, 4, layers))


def test_a_transfer_of_some_layers_is_dispatched_right_behind_them_and_once():
  orders = [StepOrder(0, 'prefill0'), transfer(1, (0, 1)), transfer(2, (1, 2)), transfer(3, (0, 1)), transfer(4, None)]
  done: list = []

  def dispatch(order, after):
    done.append(order.id)
    if isinstance(order, StepOrder):
      for layers in ((0, 1), (1, 2)):
        done.append(layers)
        after(layers)

  dispatch_in_turn(orders, dispatch)
  assert done == [0, (0, 1), 1, 3, (1, 2), 2, 4]


def test_a_step_that_fails_before_its_layers_leaves_their_transfers_to_their_own_turn():
  orders = [StepOrder(0, 'prefill0'), transfer(1, (0, 1)), transfer(2, None)]
  done: list = []
  dispatch_in_turn(orders, lambda order, after: done.append(order.id))
  assert done == [0, 1, 2]
