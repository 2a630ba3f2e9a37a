"""The shop's requests over HTTP, with FastAPI: uvicorn shop.api:app. An order and its job are one commit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel, PositiveInt
from sqlalchemy.orm import Session

from shop.models import Order, Product
from shop.tasks import pgq, reserve

app = FastAPI()


def transaction() -> Iterator[Session]:
    """One for each request; it is rolled back when the request fails. Committed before the answer goes out."""
    with Session(pgq.engine, expire_on_commit=False) as session, session.begin():
        yield session


Transaction = Annotated[Session, Depends(transaction, scope="function")]


class NewOrder(BaseModel):
    customer: str
    product: str
    quantity: PositiveInt


@app.post("/orders", status_code=202)
def place_order(new: NewOrder, session: Transaction) -> dict[str, object]:
    if session.get(Product, new.product) is None:
        raise HTTPException(404, "no such product")
    order = Order(customer=new.customer, product=new.product, quantity=new.quantity)
    session.add(order)
    session.flush()  # gives the order its id
    job = reserve.enqueue(session, order_id=order.id)
    # What raises before the commit takes back the order and its job together.
    if new.customer == "mallory":
        raise HTTPException(402, "mallory has no credit here")
    return {"order": order.id, "job": job.id}


@app.get("/orders/{number}")
def show_order(number: int, session: Transaction) -> dict[str, object]:
    order = session.get(Order, number)
    if order is None:
        raise HTTPException(404, "no such order")
    return {"order": order.id, "product": order.product, "quantity": order.quantity, "status": order.status}
