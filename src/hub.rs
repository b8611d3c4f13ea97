//! Models from the Hugging Face Hub (feature `hub`).
//!
//! Files land in the cache that other Hugging Face tools use (`HF_HUB_CACHE`, or `hub` in
//! `HF_HOME`), and what is there already is not fetched again. `HF_ENDPOINT` names another hub,
//! `HF_TOKEN` opens private models.
//!
//! What arrives is compared with the hash that the hub names, SHA-256 or git's, or with the size if
//! it names none, and a file that is another does not stay in the cache. A download that breaks off
//! starts anew the next time. Where the cache holds copies instead of links (Windows), only the
//! size is compared.

mod client;
mod download;

pub use client::{HubClient, HubOptions};

use crate::models::ModelFiles;
use crate::models::llama::shard_files;
use crate::{Error, Result};
use download::Download;
use hf_hub::repository::RepoTypeModel;
use hf_hub::{HFError, HFRepositorySync, split_id};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The index of weights that are in several files.
const SHARDS: &str = "model.safetensors.index.json";

/// A model on the Hugging Face Hub: config, tokenizer and safetensors weights.
///
/// ```no_run
/// use candle_int8_attention::hub::HubModel;
/// use candle_int8_attention::models::TextEncoder;
///
/// let model = HubModel { offline: true, ..HubModel::new("sentence-transformers/all-MiniLM-L6-v2") };
/// let encoder = TextEncoder::load(&model.fetch()?, &candle_core::Device::Cpu)?;
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    /// `owner/name`, or `name` alone for the few models that have no owner.
    pub id: String,
    /// Branch, tag or commit; `None` is `main`.
    pub revision: Option<String>,
    /// Use what is in the cache, and do not touch the network.
    pub offline: bool,
}

impl HubModel {
    /// The newest revision of a model, online.
    pub fn new(id: impl Into<String>) -> Self {
        Self { id: id.into(), revision: None, offline: false }
    }

    /// `config.json` alone, downloaded if the cache lacks it. Its `model_type` tells which kind of
    /// model this is, and so whether [`Self::fetch`] or [`Self::fetch_llama`] gets the rest.
    ///
    /// # Errors
    /// Those of [`Self::fetch`].
    pub fn fetch_config(&self) -> Result<PathBuf> {
        let client = HubClient::new(HubOptions::default())?;
        self.fetch_config_from(&client)
    }

    /// [`Self::fetch_config`] with a client of one's own.
    ///
    /// # Errors
    /// Those of [`Self::fetch`].
    pub fn fetch_config_from(&self, client: &HubClient) -> Result<PathBuf> {
        self.check_names()?;
        let (owner, name) = split_id(&self.id);
        self.file(&client.0.model(owner, name), "config.json", self.revision.as_deref())
    }

    /// The model's files, downloaded if the cache lacks them. A download shows a progress bar on
    /// stderr if that is a terminal.
    ///
    /// # Errors
    /// [`Error::Hub`] that says what to do: the hub cannot be reached, the model, the revision or a
    /// file does not exist or needs a token, or, offline, is not in the cache.
    pub fn fetch(&self) -> Result<ModelFiles> {
        let client = HubClient::new(HubOptions::default())?;
        self.fetch_from(&client)
    }

    /// [`Self::fetch`] with a client of one's own: another endpoint, cache folder, or token than
    /// the environment's.
    ///
    /// # Errors
    /// Those of [`Self::fetch`].
    pub fn fetch_from(&self, client: &HubClient) -> Result<ModelFiles> {
        self.check_names()?;
        let (owner, name) = split_id(&self.id);
        let repository = client.0.model(owner, name);
        // Small files first: what is wrong with a model shows before its weights are downloaded.
        let config = self.file(&repository, "config.json", self.revision.as_deref())?;
        // All from the commit of the first file, even if the branch moves meanwhile.
        let commit = commit_of(&config).or(self.revision.as_deref());
        let tokenizer = self.file(&repository, "tokenizer.json", commit)?;
        let weights = self.file(&repository, "model.safetensors", commit)?;
        Ok(ModelFiles { weights, config, tokenizer })
    }

    /// A Llama-family decoder, downloaded if the cache lacks it, as a path for
    /// [`LlamaModel::load`](crate::models::llama::LlamaModel::load): the folder of `config.json`,
    /// `tokenizer.json` and safetensors, in one file or in several with an index; or the GGUF file
    /// that `gguf` names.
    ///
    /// # Errors
    /// Those of [`Self::fetch`]; [`Error::Corrupt`] for an index that is none.
    pub fn fetch_llama(&self, gguf: Option<&str>) -> Result<PathBuf> {
        let client = HubClient::new(HubOptions::default())?;
        self.fetch_llama_from(&client, gguf)
    }

    /// [`Self::fetch_llama`] with a client of one's own.
    ///
    /// # Errors
    /// Those of [`Self::fetch_llama`].
    pub fn fetch_llama_from(&self, client: &HubClient, gguf: Option<&str>) -> Result<PathBuf> {
        self.check_names()?;
        let (owner, name) = split_id(&self.id);
        let repository = client.0.model(owner, name);
        if let Some(file) = gguf {
            if !file.split('/').all(is_name) {
                return Err(self.problem(format!("{file:?}, expected a file of the repository")));
            }
            return self.file(&repository, file, self.revision.as_deref());
        }
        let config = self.file(&repository, "config.json", self.revision.as_deref())?;
        let commit = commit_of(&config).or(self.revision.as_deref());
        self.file(&repository, "tokenizer.json", commit)?;
        for name in ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
            self.optional_file(&repository, name, commit)?;
        }
        match self.optional_file(&repository, SHARDS, commit)? {
            None => drop(self.file(&repository, "model.safetensors", commit)?),
            Some(index) => {
                for shard in shard_files(&index)? {
                    self.file(&repository, &shard, commit)?;
                }
            }
        }
        Ok(config.parent().map(Path::to_path_buf).unwrap_or_default())
    }

    /// A file that not every model has. Offline, one that is not in the cache counts as such. What
    /// the cache knows of a commit stays true, also that it lacks a file: the hub is not asked.
    fn optional_file(
        &self,
        repository: &HFRepositorySync<RepoTypeModel>,
        name: &str,
        revision: Option<&str>,
    ) -> Result<Option<PathBuf>> {
        let cached = self.get(repository, name, revision, true);
        let found = match cached {
            Err(HFError::LocalEntryNotFound { .. }) if !self.offline => {
                self.get(repository, name, revision, false)
            }
            _ => cached,
        };
        match found {
            Ok(path) => Ok(Some(path)),
            Err(HFError::EntryNotFound { .. } | HFError::LocalEntryNotFound { .. }) => Ok(None),
            Err(error) => Err(self.error(&error, name)),
        }
    }

    fn file(
        &self,
        repository: &HFRepositorySync<RepoTypeModel>,
        name: &str,
        revision: Option<&str>,
    ) -> Result<PathBuf> {
        let file = self.get(repository, name, revision, self.offline);
        file.map_err(|error| self.error(&error, name))
    }

    fn get(
        &self,
        repository: &HFRepositorySync<RepoTypeModel>,
        name: &str,
        revision: Option<&str>,
        offline: bool,
    ) -> std::result::Result<PathBuf, HFError> {
        let download = Arc::new(Download::new(name));
        let path = repository
            .download_file()
            .filename(name)
            .maybe_revision(revision)
            .local_files_only(offline)
            .progress(Arc::clone(&download))
            .send()?;
        download.verify(&path)?;
        Ok(path)
    }

    /// Id and revision become parts of paths and addresses.
    fn check_names(&self) -> Result<()> {
        if self.id.split('/').count() > 2 || !self.id.split('/').all(is_name) {
            return Err(self.problem("not a model id, expected owner/name".into()));
        }
        if self.revision.as_ref().is_some_and(|revision| !revision.split('/').all(is_name)) {
            return Err(self.problem("not a revision, expected a branch, a tag or a commit".into()));
        }
        Ok(())
    }

    fn error(&self, error: &HFError, file: &str) -> Error {
        self.problem(match error {
            HFError::LocalEntryNotFound { .. } => {
                format!("{file} is not in the local cache; fetch it once without offline mode")
            }
            // hf-hub does not tell these apart when it asks for a file.
            HFError::EntryNotFound { .. } => {
                format!(
                    "no {file}: this model or revision does not exist, or lacks the file; check \
                     how both are written"
                )
            }
            HFError::RepoNotFound { .. } => "no such model on the hub; check its name".into(),
            HFError::RevisionNotFound { .. } => {
                "no such revision of this model; check its name".into()
            }
            HFError::AuthRequired { .. } | HFError::Forbidden { .. } => format!(
                "{file} may not be read: the model does not exist, or it is private or gated and \
                 HF_TOKEN is not set to a token that opens it ({})",
                causes(error)
            ),
            HFError::Request { source, .. } if source.is_body() || source.is_decode() => format!(
                "the download of {file} broke off; run it again, it starts anew ({})",
                causes(error)
            ),
            HFError::Request { .. } => format!(
                "the hub cannot be reached for {file}; check the network and HF_ENDPOINT, or use \
                 offline mode if the model is in the cache ({})",
                causes(error)
            ),
            // See Download::verify.
            HFError::Io(problem) if problem.kind() == ErrorKind::InvalidData => format!(
                "{file} arrived damaged and was not kept: it {problem}; run it again, and if that \
                 does not help, check HF_ENDPOINT and proxies"
            ),
            HFError::Http { context } if context.status.is_server_error() => format!(
                "the hub has a problem ({}); try again later, or use offline mode if the model is \
                 in the cache",
                causes(error)
            ),
            HFError::MalformedResponse { .. } => format!(
                "{file} could not be fetched: what answers is no hub; check HF_ENDPOINT and \
                 proxies ({})",
                causes(error)
            ),
            HFError::RateLimited { .. } => {
                format!("the hub refuses so many requests; try again later ({})", causes(error))
            }
            _ => format!("{file} could not be fetched: {}", causes(error)),
        })
    }

    fn problem(&self, problem: String) -> Error {
        let revision = self.revision.as_deref().unwrap_or("main");
        Error::Hub { model: format!("{}@{revision}", self.id), problem }
    }
}

/// The folder of a file in the cache is named after its commit.
fn commit_of(path: &Path) -> Option<&str> {
    let folder = path.parent()?.file_name()?.to_str()?;
    (folder.len() == 40 && folder.bytes().all(|b| b.is_ascii_hexdigit())).then_some(folder)
}

/// An error with what lies below it, which alone says "connection refused".
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Whether a part of an id, a revision or a file's path is a plain name: it becomes part of a path.
fn is_name(part: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(is_plain)
}
