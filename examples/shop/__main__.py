"""The shop's requests: python -m shop open, python -m shop order ada teapot 2, python -m shop show."""

from __future__ import annotations

import sys

from sqlalchemy import select
from sqlalchemy.orm import Session

from shop.models import Base, Order, Product
from shop.tasks import pgq, reserve


def open_shop() -> None:
    Base.metadata.create_all(pgq.engine)
    with Session(pgq.engine) as session, session.begin():
        session.add_all([Product(name="teapot", available=3), Product(name="cup", available=12)])


def place_order(customer: str, product: str, quantity: int) -> None:
    with Session(pgq.engine, expire_on_commit=False) as session, session.begin():
        order = Order(customer=customer, product=product, quantity=quantity)
        session.add(order)
        session.flush()  # gives the order its id
        reserve.enqueue(session, order_id=order.id)
        # What raises before the commit takes back the order and its job together.
        require_credit(customer)
    print(f"order {order.id} placed")


def require_credit(customer: str) -> None:
    if customer == "mallory":
        raise SystemExit("mallory has no credit here; nothing was ordered")


def show() -> None:
    with Session(pgq.engine) as session:
        for product in session.scalars(select(Product).order_by(Product.name)):
            print(f"{product.name}: {product.available} available, {product.sold} sold")
        for order in session.scalars(select(Order).order_by(Order.id)):
            print(f"order {order.id}: {order.customer}, {order.quantity} × {order.product}, {order.status}")


def main() -> None:
    match sys.argv[1:]:
        case ["open"]:
            open_shop()
        case ["order", customer, product, quantity]:
            place_order(customer, product, int(quantity))
        case ["show"]:
            show()
        case _:
            raise SystemExit("usage: python -m shop open | order CUSTOMER PRODUCT QUANTITY | show")


if __name__ == "__main__":
    main()
