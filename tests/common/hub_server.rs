//! A hub on the loopback interface that speaks the download protocol of the real one.

use anyhow::Result;
use candle_int8_attention::models::ModelFiles;
use sha2::Digest;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The model that the hub has, its commit, and its files.
pub const ID: &str = "someone/some-model";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

/// A port on which nobody listens.
pub fn closed_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// What goes wrong with the content of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// The connection ends in the middle.
    BreaksOff,
    /// The connection ends in the middle, and nothing told how long the file is.
    EndsEarly,
    /// Whole by its own account, but shorter than the file.
    Shorter,
    /// As long as the file, but a bit differs.
    OtherBit,
    /// Another answer than the file.
    Status(&'static str),
}

/// The Hub's download protocol over the files of one model. Its weights are a large file: `resolve`
/// redirects to a store, and names size and SHA-256. Other files come at once, with their git id.
#[derive(Clone)]
pub struct Hub {
    pub endpoint: String,
    pub files: Arc<HashMap<&'static str, Vec<u8>>>,
    /// What is answered for everything else.
    missing: &'static str,
    fault: Arc<Mutex<Option<(&'static str, Fault)>>>,
    /// Said in the place of the ETag and of the commit of every file.
    names: Arc<Mutex<[Option<String>; 2]>>,
    slow: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<String>>>,
}

struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn read(stream: &TcpStream) -> Result<Self> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().unwrap_or(Ok(String::new()))?;
        let mut words = first.split(' ').map(str::to_string);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = HashMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_string());
        }
        Ok(Self { method, path, headers })
    }

    /// The path inside the model's repository: `/OWNER/NAME/resolve/REVISION/FILE` or `/store/FILE`.
    fn file(&self) -> &str {
        let of_a_revision =
            self.path.split_once("/resolve/").and_then(|(_, rest)| rest.split_once('/'));
        match of_a_revision {
            Some((_, file)) => file,
            None => self.path.strip_prefix("/store/").unwrap_or_default(),
        }
    }
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The id that git gives to a content.
fn git_id(content: &[u8]) -> String {
    let header = format!("blob {}\0", content.len());
    hex(sha1::Sha1::new().chain_update(header).chain_update(content).finalize())
}

/// The large file.
pub const WEIGHTS: &str = "model.safetensors";
/// A file whose ETag is no hash, as other hubs may have them.
pub const NO_HASH: &str = "m.gguf";

impl Hub {
    pub fn start(files: HashMap<&'static str, Vec<u8>>, missing: &'static str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr()?),
            files: Arc::new(files),
            missing,
            fault: Arc::default(),
            names: Arc::default(),
            slow: Arc::default(),
            requests: Arc::default(),
        };
        let serving = hub.clone();
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                serving.answer(stream).ok();
            }
        });
        Ok(hub)
    }

    /// A model whose files have contents of their own.
    pub fn of_a_model() -> Result<Self> {
        let content = |name: &'static str| (name, name.repeat(5000).into_bytes());
        Self::start(HashMap::from(FILES.map(content)), "404 Not Found")
    }

    pub fn set_fault(&self, fault: Option<(&'static str, Fault)>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// From now on, every file has this ETag or is of this commit.
    pub fn set_names(&self, etag: Option<&str>, commit: Option<&str>) {
        *self.names.lock().unwrap() = [etag, commit].map(|name| name.map(str::to_string));
    }

    /// Whether contents come in pieces, with time between them.
    pub fn set_slow(&self, slow: bool) {
        self.slow.store(slow, Ordering::Relaxed);
    }

    fn names(&self, etag: &str) -> [String; 2] {
        let [other_etag, commit] = self.names.lock().unwrap().clone();
        [other_etag.unwrap_or_else(|| etag.into()), commit.unwrap_or_else(|| COMMIT.into())]
    }

    /// The requests since the last call, as `METHOD path`.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }

    fn answer(&self, mut stream: TcpStream) -> Result<()> {
        let request = Request::read(&stream)?;
        self.requests.lock().unwrap().push(format!("{} {}", request.method, request.path));
        if let Some((hub, rest)) = request.path.split_once("/someone/old-name/") {
            // A model that was renamed, in a hub that may be below a path.
            write!(
                stream,
                "HTTP/1.1 307 Temporary Redirect\r\nLocation: {hub}/{ID}/{rest}\r\n\
                 Content-Length: 0\r\nConnection: close\r\n\r\n"
            )?;
            return Ok(());
        }
        let name = request.file();
        let Some((&name, content)) = self.files.get_key_value(name) else {
            let missing = self.missing;
            // Of a model that exists, it is told which commit lacks the file.
            let commit = match self.files.is_empty() {
                true => String::new(),
                false => {
                    let [_, commit] = self.names("");
                    format!("X-Repo-Commit: {commit}\r\nX-Error-Code: EntryNotFound\r\n")
                }
            };
            write!(
                stream,
                "HTTP/1.1 {missing}\r\n{commit}Content-Length: 0\r\nConnection: close\r\n\r\n"
            )?;
            return Ok(());
        };
        match request.path.strip_prefix("/store/") {
            None if name == WEIGHTS => {
                let [sha256, commit] = self.names(&hex(sha2::Sha256::digest(content)));
                write!(
                    stream,
                    "HTTP/1.1 302 Found\r\nLocation: {}/store/{name}\r\n\
                     ETag: \"of the redirect\"\r\nX-Linked-Etag: \"{sha256}\"\r\n\
                     X-Linked-Size: {}\r\nX-Repo-Commit: {commit}\r\nContent-Length: 0\r\n\
                     Connection: close\r\n\r\n",
                    self.endpoint,
                    content.len()
                )?;
                Ok(())
            }
            _ => self.send(stream, &request, name, content),
        }
    }

    /// A file itself, whole or the range that is asked for.
    fn send(
        &self,
        mut stream: TcpStream,
        request: &Request,
        name: &str,
        content: &[u8],
    ) -> Result<()> {
        let etag = match name {
            NO_HASH => "version 1".to_string(),
            _ => git_id(content),
        };
        let [etag, commit] = self.names(&etag);
        let etag = format!("\"{etag}\"");
        let common = format!("ETag: {etag}\r\nX-Repo-Commit: {commit}\r\nConnection: close\r\n");
        if request.headers.get("if-none-match") == Some(&etag) {
            write!(stream, "HTTP/1.1 304 Not Modified\r\n{common}\r\n")?;
            return Ok(());
        }
        let get = request.method == "GET";
        let fault = self.fault.lock().unwrap().filter(|(of, _)| get && *of == name);
        let mut body = content.to_vec();
        let mut announced = body.len();
        match fault.map(|(_, fault)| fault) {
            Some(Fault::Status(status)) => {
                let text = "<html>not the file</html>";
                let length = text.len();
                write!(
                    stream,
                    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
                )?;
                return Ok(());
            }
            Some(Fault::BreaksOff | Fault::EndsEarly) => body.truncate(announced / 2),
            Some(Fault::Shorter) => {
                announced -= 7;
                body.truncate(announced);
            }
            Some(Fault::OtherBit) => body[announced / 3] ^= 1,
            None => {}
        }
        let range = request.headers.get("range").and_then(|range| {
            let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some(
                start.parse::<usize>().ok()?..end.parse::<usize>().map_or(announced, |end| end + 1),
            )
        });
        if let Some(range) = range {
            let last = range.end - 1;
            write!(
                stream,
                "HTTP/1.1 206 Partial Content\r\n{common}Content-Length: {}\r\n\
                 Content-Range: bytes {}-{last}/{announced}\r\n\r\n",
                range.len(),
                range.start
            )?;
            body = body[range].to_vec();
        } else {
            let length = match fault {
                Some((_, Fault::EndsEarly)) => String::new(),
                _ => format!("Content-Length: {announced}\r\n"),
            };
            write!(stream, "HTTP/1.1 200 OK\r\n{common}{length}\r\n")?;
        }
        if get && self.slow.load(Ordering::Relaxed) {
            for piece in body.chunks(body.len() / 8 + 1) {
                stream.write_all(piece)?;
                std::thread::sleep(Duration::from_millis(20));
            }
        } else if get {
            stream.write_all(&body)?;
        }
        Ok(())
    }

    /// Whether the files of the cache are those of the hub, all of them.
    pub fn check_files(&self, found: &ModelFiles) -> Result<()> {
        let paths = [&found.config, &found.weights, &found.tokenizer];
        for (name, path) in FILES.iter().zip(paths) {
            assert!(std::fs::read(path)? == self.files[name], "{name}");
        }
        Ok(())
    }
}
