"""A store that speaks S3, in a thread: moto's, behind a server that fails as it is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

from loraplex.benchmarks.faulty_server import FaultyServer


@contextmanager
def s3_server(prefixes: Mapping[str, Mapping[str, bytes]]) -> Iterator[FaultyServer]:
    """A store with the bucket `adapters`. AWS's credentials must be in the environment."""
    with FaultyServer(DomainDispatcherApplication(create_backend_app)) as server:
        resource = boto3.resource("s3", endpoint_url=server.url, region_name="us-east-1")
        bucket = resource.create_bucket(Bucket="adapters")
        for prefix, files in prefixes.items():
            for name, content in files.items():
                bucket.put_object(Key=f"{prefix}/{name}", Body=content)
        yield server
        server.clear_faults()
        bucket.objects.delete()
        bucket.delete()
