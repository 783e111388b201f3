"""A small hub on loopback: what huggingface_hub's client calls to make, write and read model repositories."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {'hf_writer': 'write', 'hf_reader': 'read'}


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = {}  # oid -> {path: bytes}
        self.branches = {}  # name -> oid
        self.commit('main', None, {})

    def commit(self, branch, parent, files):
        content = json.dumps([branch, parent, len(self.commits),
                              {name: hashlib.sha256(value).hexdigest() for name, value in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision):
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """Start one with `with Hub() as hub`; `hub.url` is its HF_ENDPOINT.

    `hub.faults` holds (method, pattern of the path, status): the next request that fits gets that status; with the
    status 'truncated' half of the body, with 'corrupted' a body with other bytes; with 'cut' the connection
    ends without an answer; with 'unseen' the repository is not found.
    """

    def __init__(self):
        self.repositories, self.blobs, self.faults, self.requests = {}, {}, [], []
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """For an unmodified client in a process of its own, whose cache and token are in the folder `home`."""
        return {'HF_ENDPOINT': self.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1'}

    def files(self, name, revision='main'):
        repository = self.repositories[name]
        return repository.commits[repository.find(revision)]

    def put(self, name, files, private=False, branch='main'):
        """Make a repository with these files."""
        repository = self.repositories.setdefault(name, Repository(private))
        return repository.commit(branch, None, files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b'', **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault('Content_Type', 'application/json')
        self.send_response(status)
        sent = body
        if self.fault in ('truncated', 'corrupted') and body and self.command == 'GET':
            sent = body[:len(body) // 2] if self.fault == 'truncated' else body[:-4] + b'\x01\x02\x03\x04'
        for name, value in {'Content_Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True

    def error(self, status, message, code=None):
        self.answer(status, {'error': message}, **({'X_Error_Code': code} if code else {}), X_Error_Message=message)

    def handle_request(self):
        path = urlsplit(self.path)
        self.query = parse_qs(path.query)
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0)) \
            if self.headers.get('Transfer-Encoding') != 'chunked' else self.chunks()
        self.hub.requests.append((self.command, path.path))
        self.fault = None
        for fault in list(self.hub.faults):
            method, pattern, status = fault
            if method == self.command and re.search(pattern, path.path):
                self.hub.faults.remove(fault)
                if isinstance(status, int):
                    return self.error(status, f'as told: {status}')
                if status == 'unseen':
                    return self.error(404, 'Repository not found', 'RepoNotFound')
                if status == 'cut':
                    # A blob of which half came has another sha256: no hub keeps it.
                    self.close_connection = True
                    self.connection.close()
                    return None
                self.fault = status
                break
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        self.may = TOKENS.get(token)
        if token and self.may is None:
            return self.error(401, 'Invalid credentials')
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path.path)
            if method == self.command.replace('HEAD', 'GET') and found:
                return action(self, *map(unquote, found.groups()))
        return self.error(501, f'this hub knows no {self.command} {path.path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def repository(self, name, write=False):
        """Return the repository, or answer with the error and return None."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.may is None):
            return self.error(401 if self.may is None else 404, 'Repository not found', 'RepoNotFound')
        if write and self.may != 'write':
            return self.error(403 if self.may else 401, 'You have no right to write here')
        return repository

    def create(self):
        asked = json.loads(self.body)
        if self.may != 'write':
            return self.error(403 if self.may else 401, 'You have no right to make a repository')
        name = f'{asked["organization"]}/{asked["name"]}' if asked.get('organization') else asked['name']
        if name in self.hub.repositories:
            return self.answer(409, {'error': 'You already created this model repo', 'url': f'{self.hub.url}/{name}'})
        private = asked.get('private') or asked.get('visibility') == 'private'
        self.hub.repositories[name] = Repository(bool(private))
        return self.answer(200, {'url': f'{self.hub.url}/{name}', 'name': name})

    def info(self, name, revision='main'):
        repository = self.repository(name)
        if repository is None:
            return None
        oid = repository.find(revision)
        if oid is None:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        files = [{'rfilename': path} for path in repository.commits[oid]]
        return self.answer(200, {'id': name, 'modelId': name, 'sha': oid, 'private': repository.private,
                                 'siblings': files, 'tags': [], 'downloads': 0, 'likes': 0})

    def tree(self, name, revision):
        repository = self.repository(name)
        if repository is None:
            return None
        oid = repository.find(revision)
        if oid is None:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        return self.answer(200, [{'type': 'file', 'path': path, 'size': len(content), 'oid': '0' * 40}
                                 for path, content in repository.commits[oid].items()])

    def validate(self):
        content = json.loads(self.body)['content']
        bad = not content.startswith('---\n') or '\n---\n' not in content[4:]
        return self.answer(200, {'errors': [{'message': 'no metadata'}] if bad else [], 'warnings': []})

    def preupload(self, name, revision):
        repository = self.repository(name, write=True)
        if repository is None:
            return None
        if repository.find(revision) is None:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        modes = [{'path': file['path'], 'shouldIgnore': False,
                  'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular'}
                 for file in json.loads(self.body)['files']]
        return self.answer(200, {'files': modes})

    def batch(self, name):
        if self.repository(name, write=True) is None:
            return None
        objects = []
        for asked in json.loads(self.body)['objects']:
            entry = {'oid': asked['oid'], 'size': asked['size']}
            if asked['oid'] not in self.hub.blobs:
                entry['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{asked["oid"]}'},
                                    'verify': {'href': f'{self.hub.url}/lfs/verify'}}
            objects.append(entry)
        return self.answer(200, {'transfer': 'basic', 'objects': objects})

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, 'the sha256 is another')
        self.hub.blobs[oid] = self.body
        return self.answer(200)

    def verify(self):
        asked = json.loads(self.body)
        held = self.hub.blobs.get(asked['oid'])
        return self.answer(200, {}) if held is not None and len(held) == asked['size'] else self.error(404, 'no blob')

    def commit(self, name, revision):
        repository = self.repository(name, write=True)
        if repository is None:
            return None
        parent = repository.find(revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        if parent is None:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        if lines[0]['value'].get('parentCommit', parent) != parent:
            return self.error(412, 'A commit has happened since')
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile' and value['oid'] in self.hub.blobs:
                files[value['path']] = self.hub.blobs[value['oid']]
            else:
                return self.error(400, f'cannot do {line["key"]}')
        answer = {}
        branch = revision
        if self.query.get('create_pr') == ['1']:
            branch = f'refs/pr/{1 + sum(found.startswith("refs/pr/") for found in repository.branches)}'
            answer['pullRequestUrl'] = f'{self.hub.url}/{name}/discussions/{branch.rpartition("/")[2]}'
        oid = repository.commit(branch, parent, files)
        return self.answer(200, {'commitUrl': f'{self.hub.url}/{name}/commit/{oid}', 'commitOid': oid, **answer})

    def resolve(self, name, revision, path):
        repository = self.repository(name)
        if repository is None:
            return None
        oid = repository.find(revision)
        if oid is None:
            return self.error(404, 'Revision not found', 'RevisionNotFound')
        content = repository.commits[oid].get(path)
        if content is None:
            return self.answer(404, {'error': 'Entry not found'}, X_Error_Code='EntryNotFound', X_Repo_Commit=oid)
        return self.answer(200, content, X_Repo_Commit=oid, ETag=f'"{hashlib.sha256(content).hexdigest()}"')


_NAME = r'([^/]+/[^/]+)'
_ROUTES = (
    ('POST', '/api/repos/create', _Handler.create),
    ('POST', '/api/validate-yaml', _Handler.validate),
    ('GET', f'/api/models/{_NAME}', _Handler.info),
    ('GET', f'/api/models/{_NAME}/revision/([^/]+)', _Handler.info),
    ('GET', f'/api/models/{_NAME}/tree/([^/]+)', _Handler.tree),
    ('POST', f'/api/models/{_NAME}/preupload/([^/]+)', _Handler.preupload),
    ('POST', f'/api/models/{_NAME}/commit/([^/]+)', _Handler.commit),
    ('POST', rf'/{_NAME}\.git/info/lfs/objects/batch', _Handler.batch),
    ('PUT', '/lfs/([0-9a-f]{64})', _Handler.store),
    ('POST', '/lfs/verify', _Handler.verify),
    ('GET', f'/{_NAME}/resolve/([^/]+)/(.+)', _Handler.resolve),
)
