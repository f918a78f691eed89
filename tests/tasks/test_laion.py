"""The source `laion`: filters, outcomes as img2dataset reports them, and the source end to end."""

import csv
import hashlib
import json
import socket
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.download import download
from tasks.ingest import ingest
from tasks.params import DownloadParams, LaionParams
from tasks.pictures.index import read_index
from tasks.runtime.errors import StageError
from tasks.transfer import crawl, laion
from tasks.web import addresses
from tests.support.data_inputs import ROOT, ingest_params, picture, serving
from tests.support.hub_site import COMMIT, publish

OFF = {
    "min_side": None,
    "max_aspect_ratio": None,
    "min_similarity": None,
    "max_watermark": None,
    "max_unsafe": None,
}


def md5_of(data):
    return hashlib.md5(data).hexdigest()  # noqa: S324 - what LAION publishes


def table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def chosen(tmp_path):
    """The counts, and the rows that pass."""

    def call(*files, **filters):
        urls = tmp_path / "urls"
        urls.mkdir()
        counts = laion.select(list(files), urls, LaionParams.model_validate(OFF | filters))
        rows = [row for file in sorted(urls.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        assert counts.rows == counts.kept + sum(counts.left_out.values())
        assert [row["row"] for row in rows] == list(range(counts.kept))
        return counts, rows

    return call


def addresses_of(count):
    return [f"https://example.org/{number}.jpg" for number in range(count)]


def test_each_filter_counts_the_rows_that_it_removes(tmp_path, chosen):
    file = table(
        tmp_path / "a.parquet",
        URL=addresses_of(8),
        TEXT=[f"caption {number}" for number in range(8)],
        WIDTH=[300, 100, 900, 300, 300, 300, 300, None],
        HEIGHT=[300, 300, 300, 300, 300, 300, 300, 300],
        similarity=[0.3, 0.3, 0.3, 0.1, 0.3, 0.3, 0.3, 0.3],
        pwatermark=[0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1],
        punsafe=[0.01, 0.01, 0.01, 0.01, 0.01, 0.9, None, 0.01],
    )
    filters = {
        "min_side": 256,
        "max_aspect_ratio": 2.0,
        "min_similarity": 0.28,
        "max_watermark": 0.5,
        "max_unsafe": 0.1,
    }
    counts, rows = chosen(file, **filters)
    assert counts.left_out == {
        "smaller than min_side": 2,
        "longer than max_aspect_ratio": 1,
        "under min_similarity": 1,
        "over max_watermark": 1,
        "over max_unsafe, or unknown": 2,
    }
    assert [(row["url"], row["caption"]) for row in rows] == [("https://example.org/0.jpg", "caption 0")]


RELEASES = {
    "laion2B": {"URL": pa.string(), "TEXT": pa.string(), "WIDTH": pa.int32(), "HEIGHT": pa.int32()},
    "high resolution": {"url": pa.string(), "Caption": pa.string(), "width": pa.float64(), "Height": pa.float64()},
    "text": {"Url": pa.large_string(), "text": pa.large_string(), "WIDTH": pa.string(), "HEIGHT": pa.string()},
    "binary": {"URL": pa.binary(), "TEXT": pa.binary(), "WIDTH": pa.float32(), "HEIGHT": pa.int64()},
}


@pytest.mark.parametrize("release", RELEASES)
def test_columns_are_matched_in_any_case_and_converted(tmp_path, chosen, release):
    values = [addresses_of(3), ["a", "b", "c"], [400, 100, 500], [400, 400, 600]]
    columns = {}
    for (name, kind), its in zip(RELEASES[release].items(), values, strict=True):
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        columns[name] = pa.array([str(value) if text else value for value in its]).cast(kind)
    _, rows = chosen(table(tmp_path / "a.parquet", **columns), min_side=256)
    assert [(row["url"], row["caption"]) for row in rows] == [(values[0][0], "a"), (values[0][2], "c")]


def test_invalid_numbers_do_not_pass_and_invalid_captions_are_missing(tmp_path, chosen):
    file = table(
        tmp_path / "a.parquet",
        url=pa.array([url.encode() for url in addresses_of(4)]),
        text=pa.array([b"fine", b"caf\xe9", None, b""]),
        width=["300", "wide", "nan", "400"],
        height=["300"] * 4,
    )
    _, rows = chosen(file, min_side=256)
    assert [row["caption"] for row in rows] == ["fine", ""]


def test_only_http_urls_pass_and_each_once(tmp_path, chosen):
    urls = [
        "https://example.org/a.jpg",
        "HTTP://example.org/b.jpg",
        "ftp://example.org/c.jpg",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "https://user:password@example.org/d.jpg",
        "https://example.org/e e.jpg",
        "https://exa\nmple.org/",
        "https://[::1/",
        "//example.org/f.jpg",
        "",
        None,
        "https://example.org/a.jpg",
    ]
    counts, rows = chosen(table(tmp_path / "a.parquet", url=urls))
    assert counts.left_out == {"no http(s) address": 10, "repeated": 1}
    assert [row["url"] for row in rows] == urls[:2]


def test_languages_and_the_limit(tmp_path, chosen):
    first = table(tmp_path / "a.parquet", url=addresses_of(4), language=["en", "de", "en", "fr"])
    second = table(tmp_path / "b.parquet", url=[f"{url}?b" for url in addresses_of(3)], LANGUAGE=["en", "en", None])
    counts, rows = chosen(first, second, languages=["en", "fr"], max_images=4)
    assert counts.left_out == {"of another language": 2, "over max_images": 1}
    assert len(rows) == 4


def test_content_hashes_are_distinguished_from_other_hashes(tmp_path, chosen):
    md5, sha256 = md5_of(b"x"), hashlib.sha256(b"x").hexdigest()
    file = table(tmp_path / "a.parquet", url=addresses_of(4), hash=[md5, None, "1234567890", sha256])
    counts, rows = chosen(file)
    assert counts.hash_kind == "md5"
    assert [row["expected_hash"] for row in rows] == [md5, None, None, None]


@pytest.mark.parametrize(
    ("columns", "filters", "said"),
    [
        ({"TEXT": ["a"]}, {}, "has no column of URLs"),
        ({"URL": addresses_of(1)}, {"max_unsafe": 0.1}, "has no column 'punsafe', which download.laion.max_unsafe"),
        (
            {"URL": addresses_of(1)},
            {"languages": ["en"]},
            r"no column 'language'.*set that to \[\] to disable the filter",
        ),
        ({"URL": ["ftp://x/y"]}, {}, r"none of 1 rows passes the filters \(1 no http"),
    ],
)
def test_impossible_configurations_are_refused_in_one_sentence(tmp_path, chosen, columns, filters, said):
    with pytest.raises(StageError, match=said):
        chosen(table(tmp_path / "a.parquet", **columns), **filters)


def reported(path, rows):
    """A shard in the form that img2dataset 1.47 writes (`output_format=parquet`), and the file that says it is done."""
    names = ["url", "caption", "expected_hash", "key", "status", "error_message", "md5", "jpg"]
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names[:-1]}
    columns["row"] = pa.array([row["row"] for row in rows], pa.int64())
    columns |= {
        name: pa.nulls(len(rows), pa.int32()) for name in ("width", "height", "original_width", "original_height")
    }
    columns["jpg"] = pa.array([row.get("jpg") for row in rows], pa.binary())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": len(rows)}))


def fine(row, **others):
    data = picture(row)
    return {
        "row": row,
        "url": f"https://example.org/{row}",
        "caption": f"caption {row}",
        "status": "success",
        "md5": md5_of(data),
        "jpg": data,
    } | others


def failed(row, error, status="failed_to_download"):
    return {"row": row, "url": f"https://example.org/{row}", "status": status, "error_message": error}


def test_outcomes_are_distinguished(tmp_path):
    rows = [
        fine(1),
        fine(0, expected_hash=md5_of(picture(0))),
        fine(2, expected_hash="0" * 32),
        failed(3, "HTTP Error 404: Not Found"),
        failed(4, "Use of image disallowed by X-Robots-Tag directive"),
        failed(5, "HTTP Error 470: Address not allowed"),
        failed(6, "<urlopen error Tunnel connection failed: 470 Address not allowed>"),
        failed(7, "Image decoding error", "failed_to_resize"),
        failed(8, "HTTP Error 403: Forbidden"),
    ]
    reported(tmp_path / "shards" / "00000.parquet", rows)
    reported(tmp_path / "shards" / "00001.parquet", [fine(9)])
    raw = tmp_path / "raw"
    raw.mkdir()
    counts = laion._collect(tmp_path / "shards", raw, "md5", safety_filter=True)
    assert counts == {
        "address refused": 2,
        "dead link": 2,
        "hash mismatch": 1,
        "no image": 1,
        "opted out": 1,
        "success": 3,
    }
    lines = list(csv.DictReader((raw / "outcomes.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["key"] for line in lines] == [f"{row:09d}" for row in range(10)]
    assert lines[2]["outcome"] == "hash mismatch" and lines[2]["expected_hash"] == "0" * 32
    assert lines[3]["error"] == "HTTP Error 404: Not Found"


def test_shards_with_errors_of_the_proxy_are_downloaded_again(tmp_path):
    for number, error in enumerate(
        ["<urlopen error [Errno 111] Connection refused>", "HTTP Error 407: x", "HTTP Error 404: Not Found", None]
    ):
        reported(tmp_path / f"0000{number}.parquet", [fine(0), failed(1, error)])
    crawl._discard_incomplete(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == [
        "00002.parquet",
        "00002_stats.json",
        "00003.parquet",
        "00003_stats.json",
    ]


@pytest.fixture
def internet(tmp_path, monkeypatch):
    """A site of pictures that stands for the internet; its table of addresses; parameters for it."""
    monkeypatch.setenv("AFTERIMAGE_SCRATCH", str(tmp_path / "scratch"))
    public = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or public(address))
    with serving() as site:
        yield site


def prepare(site, path, count):
    """Publish `count` pictures and a table that names them, with everything that can go wrong among them."""
    rows = []
    for number in range(count):
        site.files[f"/{number}.jpg"] = picture(number, (64, 48), "JPEG")
        rows.append((f"{site.address}/{number}.jpg", md5_of(site.files[f"/{number}.jpg"])))
    site.files |= {"/no.jpg": picture(1), "/big.jpg": b"x" * 300_000, "/wrong.jpg": picture(2), "/bare.jpg": picture(3)}
    site.headers["/no.jpg"] = {"X-Robots-Tag": "noai"}
    site.redirects |= {"/moved.jpg": "/bare.jpg", "/inside.jpg": "http://169.254.169.254/latest/meta-data"}
    others = ["gone", "no", "big", "inside"]
    rows += [(f"{site.address}/{name}.jpg", None) for name in others]
    rows += [("http://10.0.0.1/a.jpg", None), ("https://192.168.0.1/a.jpg", None)]
    rows += [(f"{site.address}/wrong.jpg", "0" * 32), (f"{site.address}/moved.jpg", None)]
    urls, hashes = zip(*rows, strict=True)
    return table(
        path, URL=list(urls), TEXT=[f"picture {number}" for number in range(len(urls))], md5=list(hashes),
        punsafe=[0.01] * len(urls),
    )  # fmt: skip


def asked(file, **others):
    values = {**OFF, "max_unsafe": 0.1, "shard_size": 20, "threads": 4, "seconds_per_image": 10, "retries": 0}
    values |= {"max_image_bytes": 100_000, **others}
    return DownloadParams.model_validate({"source": "laion", "path": str(file), "laion": values, "licence": "various"})


@pytest.fixture
def engine(monkeypatch):
    """A stand-in for img2dataset that downloads as it does (urllib behind the proxy), in its form; no installation."""
    monkeypatch.setattr(crawl, "environment", lambda _: sys.executable)
    command = crawl._command

    def replaced(*arguments):
        python, *rest = command(*arguments)
        return [python, str(ROOT / "tests" / "support" / "small_engine.py"), *rest[2:]]

    monkeypatch.setattr(crawl, "_command", replaced)


def check_the_whole(site, tmp_path, params):
    download(tmp_path / "raw", params)
    said = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert said["details"]["outcomes"] == {
        "address refused": 3,
        "dead link": 2,
        "hash mismatch": 1,
        "opted out": 1,
        "success": 31,
    }
    assert said["details"]["filters"] == {"read": 38, "kept": 38, "left_out": {}}
    ingest(tmp_path / "raw", tmp_path / "images", tmp_path / "quarantine", ingest_params())
    index = read_index(tmp_path / "images")
    assert (index.rows, index.quarantined, index.source) == (31, {}, "laion")
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "images" / "shard-0.parquet").to_pylist()}
    assert rows["000000007"]["image"]["bytes"] == site.files["/7.jpg"]
    assert (rows["000000007"]["captions"], rows["000000007"]["safety"]) == (["picture 7"], "safe")
    assert not any(path.startswith("/latest") for path, _ in site.requests)
    assert not (tmp_path / "scratch" / "laion").exists()


def test_the_source_works_end_to_end_with_a_replacement_for_img2dataset(internet, engine, tmp_path):
    check_the_whole(internet, tmp_path, asked(prepare(internet, tmp_path / "t.parquet", 30)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_source_works_end_to_end_with_img2dataset(internet, tmp_path):
    """Installs 780 MB, once per session of tests."""
    check_the_whole(internet, tmp_path, asked(prepare(internet, tmp_path / "t.parquet", 30)))
    assert all(path.endswith((".jpg",)) for path, _ in internet.requests)


def test_too_few_successes_are_an_error_and_keep_the_images(internet, engine, tmp_path):
    file = prepare(internet, tmp_path / "t.parquet", 30)
    with pytest.raises(StageError, match=r"31 of 38 URLs gave an image .*min_success_rate 0\.9"):
        download(tmp_path / "raw", asked(file, min_success_rate=0.9))
    assert not (tmp_path / "raw").exists()
    internet.requests.clear()
    download(tmp_path / "raw", asked(file, min_success_rate=0.8))
    assert internet.requests == []


@pytest.mark.slow
def test_a_run_that_timed_out_is_continued(internet, engine, tmp_path):
    file = prepare(internet, tmp_path / "t.parquet", 30)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rows = pq.read_table(file).to_pylist()
        rows[15]["URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        pq.write_table(pa.Table.from_pylist(rows), file)
        params = asked(file, shard_size=10, processes=1, seconds_per_wait=60, seconds_per_image=60)
        with pytest.raises(StageError, match=r"1 of 4 shards are complete after download.timeout_seconds 15"):
            download(tmp_path / "raw", params.model_copy(update={"timeout_seconds": 15}))
    first = [path for path, _ in internet.requests if path in {f"/{number}.jpg" for number in range(10)}]
    assert len(first) == 10
    download(tmp_path / "raw", params)
    again = [path for path, _ in internet.requests if path in {f"/{number}.jpg" for number in range(10)}]
    assert again == first, "a complete shard is not asked for again"


def test_the_total_of_bytes_is_limited(internet, engine, tmp_path):
    file = prepare(internet, tmp_path / "t.parquet", 30)
    with pytest.raises(StageError, match=r"the images exceed download\.max_bytes 10000"):
        download(tmp_path / "raw", asked(file).model_copy(update={"max_bytes": 10_000}))


def test_tables_of_the_hub(internet, engine, tmp_path, monkeypatch):
    import huggingface_hub.constants as hub_constants

    monkeypatch.setattr(hub_constants, "ENDPOINT", internet.address)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    file = prepare(internet, tmp_path / "t.parquet", 3)
    name = "laion/relaion2B-en-research-safe"
    publish(internet, name, {"part-00000-5114fd87-c000.snappy.parquet": file.read_bytes()})
    laion_params = asked(file).laion
    params = DownloadParams(
        source="laion",
        hub={"repo": name, "revision": COMMIT, "files": "*part-00000-*.parquet"},
        laion=laion_params.model_copy(update={"min_success_rate": 0.3}),
    )
    download(tmp_path / "raw", params)
    said = json.loads((tmp_path / "raw" / "manifest.json").read_text())
    assert said["origin"] == f"hf://datasets/{name}@{COMMIT}"
    assert said["details"]["outcomes"]["success"] == 4
