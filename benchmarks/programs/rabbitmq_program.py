"""RabbitMQ through pika: a durable queue, persistent messages, publisher confirms, acknowledgements by the consumer.

Its documentation recommends for throughput: many messages in flight (a prefetch of 100 to 300,
https://www.rabbitmq.com/docs/confirms#channel-qos-prefetch-throughput), and not to wait for each publish alone. pika's
blocking channel waits for each confirm, so that bulk is published in AMQP transactions.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pika
from program import main, stop_event
from recorder import run

PREFETCH = 250
PERSISTENT = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)


def connect(url: str) -> tuple[pika.BlockingConnection, str]:
    parts = urllib.parse.urlsplit(url)
    return pika.BlockingConnection(pika.URLParameters(url)), urllib.parse.parse_qs(parts.fragment)["queue"][0]


class Producer:
    def __init__(self, connection: pika.BlockingConnection, queue: str) -> None:
        self.queue = queue
        self.confirming = connection.channel()
        self.confirming.confirm_delivery()
        self.in_bulk = connection.channel()
        self.in_bulk.tx_select()

    def publish(self, channel: Any, n: int) -> None:
        channel.basic_publish("", self.queue, b'{"n": %d}' % n, PERSISTENT, mandatory=True)

    def many(self, numbers: range) -> None:
        for n in numbers:
            self.publish(self.in_bulk, n)
        self.in_bulk.tx_commit()

    def one(self, n: int) -> None:
        self.waiting = n

    def commit(self) -> None:
        self.publish(self.confirming, self.waiting)


@contextmanager
def producer(url: str) -> Iterator[Producer]:
    connection, queue = connect(url)
    yield Producer(connection, queue)
    connection.close()


def setup(url: str) -> None:
    connection, queue = connect(url)
    connection.channel().queue_declare(queue, durable=True)
    connection.close()


def work(url: str) -> None:
    stopped = stop_event()
    connection, queue = connect(url)
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)

    def received(channel: Any, method: Any, _: Any, body: bytes) -> None:
        run(**json.loads(body))
        channel.basic_ack(method.delivery_tag)

    channel.basic_consume(queue, received)
    while not stopped.is_set():
        connection.process_data_events(time_limit=0.2)
    connection.close()


if __name__ == "__main__":
    main(setup=setup, producer=producer, work=work)
