"""What happens to an order after it was placed."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from pgqueue import PgQueue, Retry, current_job
from shop.models import Order, Product

#: The database comes from PGQUEUE_DATABASE_URL, for the requests and for `pgqueue worker shop.tasks:pgq` alike.
pgq = PgQueue()


@pgq.task(transactional=True)
def reserve(session: Session, order_id: int) -> str:
    """Take the goods from stock. The stock, the order, the next jobs and this job's completion are one commit, so
    goods are taken once, however often a worker dies on the way."""
    order = session.get_one(Order, order_id)
    product = session.get_one(Product, order.product, with_for_update=True)
    if product.available < order.quantity:
        order.status = "rejected"
    else:
        product.available -= order.quantity
        order.status = "reserved"
        # Many orders, one count: while a count is pending, further ones are skipped.
        count_sales.using(unique_key=product.name).enqueue(session, product=product.name)
    tell_customer.enqueue(session, order_id=order.id)
    return order.status


@pgq.task(queue="mail", retry=Retry(max_retries=5, base=0.2, cap=60.0))
def tell_customer(order_id: int) -> None:
    """Write to the customer. A mail server is no part of the transaction: should the worker die after the mail was
    taken and before that is known, the job runs again. So the mail carries a key by which it is taken once."""
    with Session(pgq.engine) as session:
        order = session.get_one(Order, order_id)
    # The transaction is over before the mail server is asked: it may be slow.
    deliver(order.customer, f"{order.quantity} × {order.product}: {order.status}", key=f"order {order_id}")


@pgq.task(transactional=True)
def count_sales(session: Session, product: str) -> int:
    """Bring the number of sold goods up to date."""
    sold = session.scalar(
        select(func.coalesce(func.sum(Order.quantity), 0)).where(Order.product == product, Order.status == "reserved")
    )
    assert sold is not None
    session.get_one(Product, product).sold = sold
    return sold


def deliver(customer: str, text: str, key: str) -> None:
    """Stands in for a mail server, one that is busy whenever it is asked for the first time."""
    if current_job().attempt == 1:
        raise ConnectionError("the mail server is busy")
    print(f"mail to {customer} [{key}]: {text}", flush=True)
