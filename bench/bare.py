"""What the benchmarks compare with: one FastAPI route that returns a constant through a model.

Run    .venv/bin/python bench/bare.py PORT
"""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Status(BaseModel):
    """A constant."""

    status: str


@app.get("/", response_model=Status)
async def constant() -> dict[str, str]:
    """The answer to everything."""
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), http="h11", log_level="warning", access_log=False)
