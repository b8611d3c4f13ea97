//! Which hub is asked, and where its files are kept.

use crate::{Error, Result};
use hf_hub::{HFClient, HFClientSync, HFError};
use std::path::PathBuf;

/// Another hub, cache or token than the environment names; `None` is what the environment, or
/// else the Hugging Face Hub, says.
///
/// More fields may be added: end an expression in `..HubOptions::default()`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct HubOptions {
    /// Address of a hub.
    pub endpoint: Option<String>,
    /// Folder in which files are kept.
    pub cache: Option<PathBuf>,
    /// What opens private models.
    pub token: Option<String>,
    /// How often a request that failed is sent again.
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

/// A connection to a hub, with its cache.
#[derive(Clone)]
pub struct HubClient(pub(super) HFClientSync);

impl std::fmt::Debug for HubClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubClient").finish_non_exhaustive()
    }
}

impl HubClient {
    /// A client with these options; nothing is asked yet.
    ///
    /// # Errors
    /// [`Error::Hub`] for an address that is none, or if there is no room for a client.
    pub fn new(options: HubOptions) -> Result<Self> {
        let HubOptions { endpoint, cache, token, retries } = options;
        let mut builder = HFClient::builder();
        if let Some(endpoint) = endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(cache) = cache {
            builder = builder.cache_dir(cache);
        }
        if let Some(token) = token {
            builder = builder.token(token);
        }
        if let Some(retries) = retries {
            builder = builder.retry_max_attempts(retries);
        }
        let client = builder.build().and_then(HFClientSync::from_inner);
        client.map(Self).map_err(|error: HFError| Error::Hub {
            model: "a client of the hub".into(),
            problem: super::causes(&error),
        })
    }
}
