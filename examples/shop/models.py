"""The shop's own tables. Nothing here knows of jobs."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "product"
    __table_args__ = (CheckConstraint("available >= 0"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    available: Mapped[int]
    sold: Mapped[int] = mapped_column(default=0)


class Order(Base):
    __tablename__ = "customer_order"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    product: Mapped[str] = mapped_column(ForeignKey("product.name"))
    quantity: Mapped[int]
    status: Mapped[str] = mapped_column(default="placed")  #: placed, reserved or rejected
