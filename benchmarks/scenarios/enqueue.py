"""How fast jobs are enqueued: in bulk, and one by one beside an application's own rows."""

from __future__ import annotations

from benchmarks.rows import Claim, Measure, Metrics, Row, Scale
from benchmarks.scenarios.drain import jobs_for
from benchmarks.systems import PEER_NAMES, POSTGRESQL_PEERS, Bench, System

ENQUEUED = "enqueued/s"
SINGLE = "one per transaction: enqueued/s"
BLOCK_SECONDS = 0.25

KINDS = (
    "row and enqueue",
    "row and bare INSERT",
    "row alone",
    "row, bare INSERT and NOTIFY inside",
    "enqueue alone",
    "bare INSERT alone",
)
TRANSACTIONS = tuple(f"{kind}: transactions/s" for kind in KINDS)


def bulk(bench: Bench, system: System, scale: Scale) -> Metrics:
    with bench.database(system) as database:
        in_bulk = bench.fill(system, database, jobs_for(system, scale))
    with bench.database(system) as database:
        seconds = bench.run(system, database, "single", jobs=scale.single)["seconds"]
    return {ENQUEUED: in_bulk, SINGLE: scale.single / seconds}


def transactions(clients: int) -> Measure:
    def measure(bench: Bench, system: System, scale: Scale) -> Metrics:
        with bench.database(system) as database:
            rates: Metrics = bench.run_program(
                "transactions.py",
                system,
                database,
                "run",
                clients=clients,
                blocks=scale.blocks,
                block_seconds=BLOCK_SECONDS,
            )
        return {f"{kind}: transactions/s": rate for kind, rate in rates.items()}

    return measure


def _transaction_row(number: int, clients: int) -> Row:
    return Row(
        number,
        "One job per transaction, beside a row of the application, through a Session: "
        + ("1 client" if clients == 1 else f"{clients} clients"),
        TRANSACTIONS,
        ("pgqueue",),
        transactions(clients),
        claims=(
            Claim(("pgqueue", TRANSACTIONS[0]), (("pgqueue", TRANSACTIONS[1]),), at_least=0.9),
            Claim(("pgqueue", TRANSACTIONS[4]), (("pgqueue", TRANSACTIONS[5]),), at_least=0.85),
        ),
    )


ROWS = (
    Row(
        4,
        "Bulk enqueue, 1,000 jobs per transaction",
        (ENQUEUED, SINGLE),
        ("pgqueue", "limit", *PEER_NAMES),
        bulk,
        claims=(
            Claim(("pgqueue", ENQUEUED), tuple((peer, ENQUEUED) for peer in POSTGRESQL_PEERS), at_least=2.0),
            Claim(("pgqueue", ENQUEUED), (("limit", ENQUEUED),), at_least=0.75),
        ),
        plotted=True,
    ),
    _transaction_row(5, clients=1),
    _transaction_row(6, clients=8),
)
