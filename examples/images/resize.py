"""Three consumers make images smaller, and a fourth gets stuck: python resize.py [FOLDER]

Claims by hand: for programs that have a loop of their own. Run it with PGQUEUE_DATABASE_URL set, after
`pgqueue db upgrade`. Needs Pillow.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pgqueue import ClaimedJob, PgQueue

#: Longer than any image takes. A consumer that needs more calls `pgq.extend_async`.
LEASE_SECONDS = 30.0
STUCK_SECONDS = 2.0
IMAGES = 12
SIZE = (160, 120)

pgq = PgQueue()
resize = pgq.external_task("resize", queue="images", max_retries=3)


async def main(folder: Path) -> None:
    make_images(folder)
    with pgq.begin() as connection:
        resize.enqueue_many(connection, [{"file": path.name} for path in sorted(folder.glob("*.png"))])

    # This one claims a job, and is never heard of again.
    (stuck,) = await pgq.claim_async("stuck", queue="images", lease=STUCK_SECONDS)
    print(f"stuck: job {stuck.id}, and no more", flush=True)

    await asyncio.gather(*(consume(f"worker-{n}", folder) for n in (1, 2, 3)))

    # Its lease over, the job is in what the next consumer claims: nobody has to look for it.
    await asyncio.sleep(STUCK_SECONDS)
    await consume("rescuer", folder)
    await pgq.async_engine.dispose()


async def consume(worker: str, folder: Path) -> None:
    """Until there is nothing left to claim."""
    while jobs := await pgq.claim_async(worker, queue="images", limit=2, lease=LEASE_SECONDS):
        for job in jobs:
            await consume_one(worker, job, folder)


async def consume_one(worker: str, job: ClaimedJob, folder: Path) -> None:
    try:
        result = await asyncio.to_thread(make_smaller, folder / job.payload["file"], job.attempt)
    except UnidentifiedImageError as error:  # will never be an image
        await pgq.nack_async(job, error=error, dead=True)
        print(f"{worker}: job {job.id} is dead: no image", flush=True)
    except ConnectionError as error:  # may work the next time: one of the retries is charged
        await pgq.nack_async(job, error=error, delay=0)
        print(f"{worker}: job {job.id} is given back: {error}", flush=True)
    else:
        await pgq.ack_async(job, result=result)
        print(f"{worker}: job {job.id} is done", flush=True)


def make_smaller(file: Path, attempt: int) -> dict[str, object]:
    if attempt == 1 and file.stem.endswith(("03", "07")):  # stands in for what goes wrong out there
        raise ConnectionError("the store of images is busy")
    with Image.open(file) as image:
        image.thumbnail(SIZE)
        image.save(file.with_suffix(".jpg"))
        return {"file": file.with_suffix(".jpg").name, "size": image.size}


def make_images(folder: Path) -> None:
    """Real images, and a file that only looks like one."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(IMAGES):
        Image.linear_gradient("L").resize((640 + 10 * n, 480)).convert("RGB").save(folder / f"image-{n:02}.png")
    (folder / "notes.png").write_text("not an image")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "images")))
