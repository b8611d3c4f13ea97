//! Requests to a hub: what it says of a file, and its bytes.

use crate::Error;
use std::io::{Error as IoError, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

/// The hub of Hugging Face.
const PUBLIC: &str = "https://huggingface.co";

/// Redirects within a hub: models that were renamed.
const REDIRECTS: usize = 10;

/// Requests that a hub does not answer are made again after this time, then after twice as much.
const PAUSE: Duration = Duration::from_millis(200);

/// Another hub, cache or token than the environment names; `None` is what the environment, or
/// else the Hugging Face Hub, says.
///
/// More fields may be added: end an expression in `..HubOptions::default()`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct HubOptions {
    /// Address of a hub: `https://..`, or `http://..` where nobody can come between. Without it
    /// `HF_ENDPOINT`.
    pub endpoint: Option<String>,
    /// Folder in which files are kept. Without it `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in
    /// `huggingface` of the user's cache folder.
    pub cache: Option<PathBuf>,
    /// What opens private models. It is sent to the hub alone, not to where the hub redirects.
    /// Without it `HF_TOKEN`, or what is in the file `HF_TOKEN_PATH` or in `token` in `HF_HOME`.
    pub token: Option<String>,
    /// How often a request is sent again that a hub did not answer, or answered with a problem of
    /// its own. Without it 3 times, with longer and longer pauses.
    pub retries: Option<usize>,
}

impl std::fmt::Debug for HubOptions {
    /// The token is not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { endpoint, cache, token, retries } = self;
        f.debug_struct("HubOptions")
            .field("endpoint", endpoint)
            .field("cache", cache)
            .field("token", &token.as_ref().map(|_| ".."))
            .field("retries", retries)
            .finish()
    }
}

/// Where models are fetched from, and where they are kept.
///
/// ```no_run
/// use candle_int8_attention::hub::{HubClient, HubModel, HubOptions};
///
/// let endpoint = Some("https://hub.example.org".to_string());
/// let mirror = HubClient::new(HubOptions { endpoint, ..HubOptions::default() })?;
/// let files = HubModel::new("someone/some-model").fetch_from(&mirror)?;
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Clone)]
pub struct HubClient {
    /// Without a slash at its end.
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    retries: usize,
}

impl std::fmt::Debug for HubClient {
    /// The token is not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubClient")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .finish_non_exhaustive()
    }
}

impl HubClient {
    /// A client with these options; nothing is asked yet.
    ///
    /// # Errors
    /// [`Error::Hub`] for an address that is none.
    pub fn new(options: HubOptions) -> Result<Self, Error> {
        let HubOptions { endpoint, cache, token, retries } = options;
        let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let of_user = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".cache");
            cache.unwrap_or_else(of_user).join("huggingface")
        });
        let endpoint = endpoint.or_else(|| variable("HF_ENDPOINT"));
        let endpoint = endpoint.unwrap_or_else(|| PUBLIC.to_string());
        if !["https://", "http://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            let problem = format!("{endpoint:?} is no address, expected https://.. (HF_ENDPOINT)");
            return Err(Error::Hub { model: "a client of the hub".into(), problem });
        }
        let named = || variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: cache.or_else(|| Some(named()?.into())).unwrap_or_else(|| home.join("hub")),
            token: token.or_else(|| implicit_token(&home)),
            retries: retries.unwrap_or(3),
        })
    }

    pub(super) fn cache_folder(&self) -> &Path {
        &self.cache
    }

    /// What the hub says of a file.
    pub(super) fn ask(&self, file: &RemoteFile<'_>) -> Result<Answer, Failure> {
        let mut address = self.address(file);
        for _ in 0..=REDIRECTS {
            let response = self.answered(|| self.request("HEAD", &address, 0))?;
            let headers = response.headers();
            let status = response.status();
            let inside = text(headers, header::LOCATION.as_str()).filter(|to| {
                status.is_redirection() && to.starts_with('/') && !to.starts_with("//")
            });
            match inside {
                Some(to) => address = format!("{}{to}", self.host()),
                None if status.is_success() || status.is_redirection() => {
                    return Answer::of(headers);
                }
                None => {
                    let commit = text(headers, COMMIT).map(str::to_string);
                    return Err(Failure::Status { status: status.as_u16(), commit });
                }
            }
        }
        Err(Failure::NoHub("it redirects without end".into()))
    }

    /// The bytes of a file.
    pub(super) fn get(&self, file: &RemoteFile<'_>) -> Result<impl Read + 'static, Failure> {
        let address = self.address(file);
        let response = self.answered(|| self.request("GET", &address, REDIRECTS as u32))?;
        match response.status() {
            status if status.is_success() => {
                Ok(response.into_body().into_with_config().limit(u64::MAX).reader())
            }
            status => Err(Failure::Status { status: status.as_u16(), commit: None }),
        }
    }

    fn address(&self, file: &RemoteFile<'_>) -> String {
        format!("{}{}", self.endpoint, file.path())
    }

    /// The endpoint without its path, if it has one.
    fn host(&self) -> &str {
        let start = self.endpoint.find("://").map_or(0, |at| at + 3);
        let path = self.endpoint[start..].find('/');
        path.map_or(&self.endpoint, |at| &self.endpoint[..start + at])
    }

    /// A response, after as many attempts as it takes.
    fn answered(
        &self,
        request: impl Fn() -> Result<Response<Body>, Failure>,
    ) -> Result<Response<Body>, Failure> {
        let mut pause = PAUSE;
        for _ in 0..self.retries {
            match request() {
                Err(Failure::Unreachable(_)) => {}
                Ok(response) if is_transient(response.status().as_u16()) => {}
                done => return done,
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        request()
    }

    fn request(
        &self,
        method: &str,
        address: &str,
        redirects: u32,
    ) -> Result<Response<Body>, Failure> {
        let secure = self.endpoint.starts_with("https://");
        // The certificates that the system trusts, as its other programs do.
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let agent: Agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(redirects)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            // A redirect must not lead out of what https protects.
            .https_only(secure)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .user_agent(concat!("candle-int8-attention/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        let mut request = ureq::http::Request::builder().method(method).uri(address);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(()).map_err(|e| Failure::NoHub(e.to_string()))?;
        agent.run(request).map_err(|error| match error {
            ureq::Error::RequireHttpsOnly(to) => {
                Failure::Refused(format!("a redirect from https to {to:?}"))
            }
            ureq::Error::BadUri(what) => Failure::NoHub(what),
            other => Failure::Unreachable(other.to_string()),
        })
    }
}

/// Statuses that may be others the next time.
pub(super) fn is_transient(status: u16) -> bool {
    matches!(status, 408 | 429 | 500 | 502..=504)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn implicit_token(home: &Path) -> Option<String> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let of_file = |path: PathBuf| {
        let token = std::fs::read_to_string(path).ok()?.trim().to_string();
        (!token.is_empty()).then_some(token)
    };
    variable("HF_TOKEN")
        .or_else(|| of_file(variable("HF_TOKEN_PATH")?.into()))
        .or_else(|| of_file(home.join("token")))
}

/// A file of a revision of a model. All parts are plain names.
pub(super) struct RemoteFile<'a> {
    pub id: &'a str,
    pub revision: &'a str,
    pub name: &'a str,
}

impl RemoteFile<'_> {
    fn path(&self) -> String {
        format!("/{}/resolve/{}/{}", self.id, self.revision.replace('/', "%2F"), self.name)
    }
}

const COMMIT: &str = "x-repo-commit";

/// What a hub says of a file. Its parts become names in the cache, so they are plain ones.
#[derive(Debug)]
pub(super) struct Answer {
    /// The commit that the revision names.
    pub commit: String,
    /// What identifies the content: its SHA-256, git's id of it, or any name.
    pub etag: String,
    /// Bytes; none if the hub does not say.
    pub size: Option<u64>,
}

impl Answer {
    fn of(headers: &HeaderMap) -> Result<Self, Failure> {
        let missing = |name| Failure::NoHub(format!("its answer has no {name}"));
        let etag = text(headers, "x-linked-etag").or(text(headers, header::ETAG.as_str()));
        let etag = etag.ok_or_else(|| missing("ETag"))?;
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
        if !is_blob_name(etag) {
            return Err(Failure::Refused(format!("the ETag {etag:?}, expected a plain name")));
        }
        let commit = text(headers, COMMIT).ok_or_else(|| missing("X-Repo-Commit"))?;
        if !is_commit(commit) {
            let problem = format!("the commit {commit:?}, expected 40 hexadecimal digits");
            return Err(Failure::Refused(problem));
        }
        let size = text(headers, "x-linked-size").or(text(headers, "content-length"));
        let size = size.and_then(|size| size.parse().ok());
        Ok(Self { commit: commit.to_string(), etag: etag.to_string(), size })
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether this names a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether an ETag can be the name of a file in a folder, whatever the system.
fn is_blob_name(etag: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+= ".contains(c);
    let edge = |c: char| c.is_ascii_alphanumeric() || "-_=".contains(c);
    let mut ends = etag.chars().next().into_iter().chain(etag.chars().last());
    (1..=128).contains(&etag.len()) && etag.chars().all(plain) && ends.all(edge)
}

/// Why a file could not be had.
#[derive(Debug)]
pub(super) enum Failure {
    /// Not in the cache, and the network is not to be used.
    NotCached,
    /// Another answer than the file, and the commit that it is of.
    Status { status: u16, commit: Option<String> },
    /// No answer.
    Unreachable(String),
    /// The bytes ended early.
    BrokeOff(String),
    /// The bytes are others than the hub's.
    Damaged(String),
    /// An answer that no hub gives.
    NoHub(String),
    /// An answer that would do harm.
    Refused(String),
    /// The cache cannot be read or written.
    Cache(PathBuf, IoError),
}

impl Failure {
    /// Of reading the bytes of a file.
    pub(super) fn of_reading(error: IoError) -> Self {
        match error.kind() {
            ErrorKind::TimedOut => Self::BrokeOff("it stalled".into()),
            _ => Self::BrokeOff(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etags_are_names_of_files_or_refused() {
        for good in ["0a1b", "version 1", "5f3c-1a2b", "a.b", "x"] {
            assert!(is_blob_name(good), "{good:?}");
        }
        let long = "a".repeat(129);
        for bad in ["", ".", "..", "../a", "/a", "a/b", "a\\b", ".a", "a.", "C:a", " a", "é", &long]
        {
            assert!(!is_blob_name(bad), "{bad:?}");
        }
        assert!(is_commit(&"0a".repeat(20)) && !is_commit(&"0g".repeat(20)) && !is_commit("../.."));
    }

    #[test]
    fn a_token_is_not_shown() {
        let options = HubOptions { token: Some("hf_secret".into()), ..HubOptions::default() };
        let client = HubClient::new(options.clone()).unwrap();
        assert!(!format!("{client:?} {options:?}").contains("secret"));
    }

    #[test]
    fn an_address_that_is_none_is_an_error() {
        for address in ["", "hub.example.org", "ftp://hub.example.org", "file:///etc"] {
            let options = HubOptions { endpoint: Some(address.into()), ..HubOptions::default() };
            let error = HubClient::new(options).unwrap_err().to_string();
            assert!(error.contains("is no address, expected https://"), "{error}");
        }
    }
}
