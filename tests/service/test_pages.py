"""Serving the web page: its files and no others, with headers that keep foreign code out."""

import http.client
import re
from pathlib import Path

import pytest
from browser import served
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve.errors import install_handlers
from serve.pages import WEB, add_pages

FILES = sorted(path.name for path in WEB.iterdir())
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECRET = "not for the web"


def application(directory: Path = WEB) -> FastAPI:
    api = FastAPI()
    install_handlers(api)
    add_pages(api, directory)
    return api


@pytest.fixture(scope="module")
def web():
    with TestClient(application()) as client:
        yield client


@pytest.fixture
def folder(tmp_path):
    """A folder of page files beside a file that is none of its business."""
    (tmp_path / "secret.js").write_text(SECRET)
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "main.js").write_text("export {};")
    return folder


@pytest.fixture
def raw_get(folder):
    """GET with the path as it is: clients tidy paths up before they send them."""
    with served(application(folder)) as address:
        host, port = address.removeprefix("http://").split(":")

        def get(path):
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.putrequest("GET", path, skip_host=False)
            connection.endheaders()
            response = connection.getresponse()
            return response, response.read()

        yield get


def assert_not_found(response):
    assert response.status_code == 404, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "not_found"


def test_the_page_is_at_the_root(web):
    response = web.get("/")
    assert response.status_code == 200
    assert response.content == (WEB / "index.html").read_bytes()
    assert response.headers["content-type"] == TYPES[".html"]


@pytest.mark.parametrize("name", [name for name in FILES if name != "index.html"])
def test_each_file_is_served_with_its_type(web, name):
    response = web.get(f"/web/{name}")
    assert response.status_code == 200
    assert response.content == (WEB / name).read_bytes()
    assert response.headers["content-type"] == TYPES[Path(name).suffix]


@pytest.mark.parametrize("path", ["/", "/web/main.js", "/web/style.css"])
def test_headers_keep_foreign_code_out(web, path):
    headers = web.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert not re.search(r"unsafe|\*|https?:|data:", headers["content-security-policy"])
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", ["/", "/web/main.js"])
def test_a_browser_asks_again_and_is_told_that_nothing_changed(web, path):
    first = web.get(path)
    assert first.headers["cache-control"] == "no-cache"
    again = web.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"
    assert web.get(path, headers={"If-None-Match": '"another"'}).status_code == 200


def test_a_changed_file_has_another_etag(folder):
    with TestClient(application(folder)) as client:
        before = client.get("/web/main.js").headers["etag"]
        (folder / "main.js").write_text("export const changed = true;")
        after = client.get("/web/main.js", headers={"If-None-Match": before})
    assert after.status_code == 200
    assert after.headers["etag"] != before


def test_head_says_what_get_would(web):
    for path in ("/", "/web/main.js"):
        head, get = web.head(path), web.get(path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(get.content))


def test_the_page_by_its_name_leads_to_the_root(web):
    response = web.get("/web/index.html", follow_redirects=False)
    assert response.status_code == 307
    assert web.get("/web/index.html").url.path == "/"


@pytest.mark.parametrize("path", ["/web/", "/web/none.js", "/web/main.js/x", "/webmain.js", "/main.js"])
def test_what_is_not_there_is_not_found(web, path):
    assert_not_found(web.get(path))


def test_the_page_cannot_be_written(web):
    response = web.post("/web/main.js", content="alert(1)")
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    [
        "/web/../secret.js",
        "/web/../web/../secret.js",
        "/web/./../secret.js",
        "/web/..%2fsecret.js",
        "/web/%2e%2e/secret.js",
        "/web/%2e%2e%2fsecret.js",
        "/web/%252e%252e%252fsecret.js",
        "/web/..%5csecret.js",
        "/web/..\\secret.js",
        "/web//etc/passwd",
        "/web/%2fetc%2fpasswd",
        "/web/{folder}/main.js",
        "/web//{folder}/main.js",
        "/web/%2f{folder}/../secret.js",
        "/web/main.js%00",
        "/web/%00",
        "/web/..%00/secret.js",
        "/web/main.js%00.html",
        "/web/" + "a" * 5000 + ".js",
        "/web/%ff%fe.js",
    ],
)
def test_path_tricks_find_nothing(raw_get, folder, path):
    response, body = raw_get(path.replace("{folder}", str(folder)))
    assert response.status == 404, body
    assert b'"error"' in body
    assert SECRET.encode() not in body


def test_dots_within_the_folder_are_no_trick(raw_get):
    response, body = raw_get("/web/x/../main.js")
    assert (response.status, body) == (200, b"export {};")


def test_links_that_lead_out_of_the_folder_find_nothing(folder):
    (folder / "link.js").symlink_to(folder.parent / "secret.js")
    (folder / "up").symlink_to(folder.parent)
    (folder / "nowhere.js").symlink_to(folder / "missing.js")
    (folder / "loop.js").symlink_to(folder / "loop.js")
    with TestClient(application(folder), raise_server_exceptions=False) as client:
        for name in ("link.js", "up/secret.js", "nowhere.js", "loop.js"):
            assert_not_found(client.get(f"/web/{name}"))


@pytest.mark.parametrize("name", ["main.js~", ".main.js.swp", "notes.txt", "key.pem", "main.js.map", "main"])
def test_files_of_other_kinds_are_no_part_of_the_page(folder, name):
    (folder / name).write_text(SECRET)
    with TestClient(application(folder)) as client:
        assert_not_found(client.get(f"/web/{name}"))


def test_a_folder_is_no_file(folder):
    (folder / "inner.js").mkdir()
    with TestClient(application(folder)) as client:
        assert_not_found(client.get("/web/inner.js"))


def test_the_page_asks_no_other_server_and_runs_no_inline_code():
    """What the policy would refuse must not be there in the first place."""
    for name in FILES:
        text = (WEB / name).read_text()
        addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, name
        assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML|srcdoc)|document\.write|\beval\(", text), name
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script([^>]*)>([^<]*)</script>", page) == [(' type="module" src="web/main.js"', "")]


def test_every_import_of_the_page_is_a_file_of_it():
    for path in WEB.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', path.read_text()):
            assert name in FILES, f"{path.name} imports {name}"


def test_the_service_has_the_page_and_its_api_does_not_list_it(client):
    assert client.get("/").content == (WEB / "index.html").read_bytes()
    assert client.get("/v1/models").status_code == 200
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or path.startswith("/web")]
