//! Models from the Hugging Face Hub (feature `hub`).
//!
//! Files land in the cache that other Hugging Face tools use (`HF_HUB_CACHE`, or `hub` in
//! `HF_HOME`), and what is there already is not fetched again. `HF_ENDPOINT` names another hub,
//! `HF_TOKEN` opens private models. A download that breaks off starts anew the next time.
//!
//! # What is trusted
//!
//! - The hub, over https: which commit a branch names, which hash a file has. Whoever answers in its
//!   place, over plain http or with a certificate that the system trusts, decides what is loaded. A
//!   redirect from https to http is refused. Name a commit as the revision to depend on less: what
//!   the cache has of a commit is used without asking.
//! - What is in the cache. It belongs to the user; files that other tools put there are taken as
//!   those tools left them.
//!
//! Not trusted:
//!
//! - What arrives. It takes its name in the cache only when its hash is the one that the hub named
//!   (SHA-256, or git's), or, where a hub names none, its size. Until then it is a file without a
//!   name, which no other process finds; processes that download the same file end with a good one,
//!   each of them, also if one of them is killed.
//! - The names that a hub answers with. A commit that is not 40 hexadecimal digits, or an ETag that
//!   is not a plain name, is refused before anything is written: nothing is written outside of the
//!   cache.
//! - The files' contents. They are read as any other file is, see `SECURITY.md`. A chat template is a
//!   program; this crate hands it out and does not run it.
//!
//! How much a hub sends is not bounded but by the disk.

mod cache;
mod client;
mod download;

pub use client::{HubClient, HubOptions};

use crate::models::{ModelFiles, Module, SENTENCE_FILES, read_modules, shard_files};
use crate::{Error, Result};
use cache::{Cache, Known};
use client::{Failure, RemoteFile};
use std::path::{Path, PathBuf};

/// The revision that is taken where none is named.
const MAIN: &str = "main";

/// The index of weights that are in several files.
const SHARDS: &str = "model.safetensors.index.json";

/// Weights that are in one file.
const WEIGHTS: &str = "model.safetensors";

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
        self.fetch_config_from(&HubClient::new(HubOptions::default())?)
    }

    /// [`Self::fetch_config`] with a client of one's own.
    ///
    /// # Errors
    /// Those of [`Self::fetch`].
    pub fn fetch_config_from(&self, client: &HubClient) -> Result<PathBuf> {
        self.check_names()?;
        self.file(client, "config.json", self.revision.as_deref())
    }

    /// The model's files, downloaded if the cache lacks them, with those that sentence-transformers
    /// stores beside them; weights in one file, or in several with an index. A download shows a progress bar on
    /// stderr if that is a terminal.
    ///
    /// # Errors
    /// [`Error::Hub`] that says what to do: the hub cannot be reached, the model, the revision or a
    /// file does not exist or needs a token, or, offline, is not in the cache.
    pub fn fetch(&self) -> Result<ModelFiles> {
        self.fetch_from(&HubClient::new(HubOptions::default())?)
    }

    /// [`Self::fetch`] with a client of one's own: another endpoint, cache folder, or token than
    /// the environment's.
    ///
    /// # Errors
    /// Those of [`Self::fetch`].
    pub fn fetch_from(&self, client: &HubClient) -> Result<ModelFiles> {
        self.check_names()?;
        // Small files first: what is wrong with a model shows before its weights are downloaded.
        let config = self.file(client, "config.json", self.revision.as_deref())?;
        // All from the commit of the first file, even if the branch moves meanwhile.
        let commit = commit_of(&config).or(self.revision.as_deref());
        let tokenizer = self.file(client, "tokenizer.json", commit)?;
        // How its embeddings are meant, where the authors say so. A model that is in the cache is not
        // asked for again.
        let cache = Cache::new(client.cache_folder(), &self.id);
        let is_new = [WEIGHTS, SHARDS].iter().all(|name| {
            matches!(cache.find(commit.unwrap_or(MAIN), name), Known::Nothing | Known::Missing)
        });
        if is_new {
            self.fetch_sentence_files(client, commit)?;
        }
        let weights = self.weights(client, commit)?;
        Ok(ModelFiles { weights, config, tokenizer })
    }

    /// What sentence-transformers stores beside a model.
    fn fetch_sentence_files(&self, client: &HubClient, commit: Option<&str>) -> Result<()> {
        for name in SENTENCE_FILES {
            self.optional_file(client, name, commit)?;
        }
        // Known by now, whether there is one or not.
        let Some(modules) = self.optional_file(client, SENTENCE_FILES[0], commit)? else {
            return Ok(());
        };
        for file in read_modules(&modules)?.iter().flat_map(Module::files) {
            if !file.split('/').all(is_name) {
                return Err(self.problem(format!("modules.json names {file:?}, expected a folder")));
            }
            self.optional_file(client, &file, commit)?;
        }
        Ok(())
    }

    /// The weights: one file, or else an index and what it names.
    fn weights(&self, client: &HubClient, commit: Option<&str>) -> Result<PathBuf> {
        let missing = match self.get(client, WEIGHTS, commit) {
            Ok(path) => return Ok(path),
            Err(missing @ (Failure::Status { status: 404, .. } | Failure::NotCached)) => missing,
            Err(failure) => return Err(self.error(failure, WEIGHTS)),
        };
        let Some(index) = self.optional_file(client, SHARDS, commit)? else {
            return Err(self.error(missing, WEIGHTS));
        };
        for shard in shard_files(&index)? {
            self.file(client, &shard, commit)?;
        }
        Ok(index)
    }

    /// A Llama-family decoder, downloaded if the cache lacks it, as a path for
    /// [`LlamaModel::load`](crate::models::llama::LlamaModel::load): the folder of `config.json`,
    /// `tokenizer.json` and safetensors, in one file or in several with an index; or the GGUF file
    /// that `gguf` names.
    ///
    /// # Errors
    /// Those of [`Self::fetch`]; [`Error::Corrupt`] for an index that is none.
    pub fn fetch_llama(&self, gguf: Option<&str>) -> Result<PathBuf> {
        self.fetch_llama_from(&HubClient::new(HubOptions::default())?, gguf)
    }

    /// [`Self::fetch_llama`] with a client of one's own.
    ///
    /// # Errors
    /// Those of [`Self::fetch_llama`].
    pub fn fetch_llama_from(&self, client: &HubClient, gguf: Option<&str>) -> Result<PathBuf> {
        self.check_names()?;
        if let Some(file) = gguf {
            if !file.split('/').all(is_name) {
                return Err(self.problem(format!("{file:?}, expected a file of the repository")));
            }
            return self.file(client, file, self.revision.as_deref());
        }
        let config = self.file(client, "config.json", self.revision.as_deref())?;
        let commit = commit_of(&config).or(self.revision.as_deref());
        self.file(client, "tokenizer.json", commit)?;
        for name in ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
            self.optional_file(client, name, commit)?;
        }
        self.weights(client, commit)?;
        Ok(config.parent().map(Path::to_path_buf).unwrap_or_default())
    }

    /// A file that not every model has. Offline, one that is not in the cache counts as such. What
    /// the cache knows of a commit stays true, also that it lacks a file: the hub is not asked.
    fn optional_file(
        &self,
        client: &HubClient,
        name: &str,
        revision: Option<&str>,
    ) -> Result<Option<PathBuf>> {
        let cache = Cache::new(client.cache_folder(), &self.id);
        match cache.find(revision.unwrap_or(MAIN), name) {
            Known::File(path) => return Ok(Some(path)),
            Known::Missing => return Ok(None),
            Known::Nothing if self.offline => return Ok(None),
            Known::Nothing => {}
        }
        match self.get(client, name, revision) {
            Ok(path) => Ok(Some(path)),
            Err(Failure::Status { status: 404, .. }) => Ok(None),
            Err(failure) => Err(self.error(failure, name)),
        }
    }

    fn file(&self, client: &HubClient, name: &str, revision: Option<&str>) -> Result<PathBuf> {
        self.get(client, name, revision).map_err(|failure| self.error(failure, name))
    }

    fn get(
        &self,
        client: &HubClient,
        name: &str,
        revision: Option<&str>,
    ) -> std::result::Result<PathBuf, Failure> {
        let cache = Cache::new(client.cache_folder(), &self.id);
        let file = RemoteFile { id: &self.id, revision: revision.unwrap_or(MAIN), name };
        download::fetch(client, &cache, &file, self.offline)
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

    fn error(&self, failure: Failure, file: &str) -> Error {
        self.problem(match failure {
            Failure::NotCached => {
                format!("{file} is not in the local cache; fetch it once without offline mode")
            }
            // A hub does not tell these apart when it is asked for a file.
            Failure::Status { status: 404, .. } => format!(
                "no {file}: this model or revision does not exist, or lacks the file; check how both \
                 are written"
            ),
            Failure::Status { status: status @ (401 | 403), .. } => format!(
                "{file} may not be read: the model does not exist, or it is private or gated and \
                 HF_TOKEN is not set to a token that opens it (status {status})"
            ),
            Failure::Status { status: 429, .. } => {
                "the hub refuses so many requests; try again later".to_string()
            }
            Failure::Status { status: status @ 500.., .. } => format!(
                "the hub has a problem (status {status}); try again later, or use offline mode if \
                 the model is in the cache"
            ),
            Failure::Status { status, .. } => {
                format!("{file} could not be fetched: status {status}")
            }
            Failure::Unreachable(problem) => format!(
                "the hub cannot be reached for {file}; check the network and HF_ENDPOINT, or use \
                 offline mode if the model is in the cache ({problem})"
            ),
            Failure::BrokeOff(problem) => {
                format!("the download of {file} broke off; run it again, it starts anew ({problem})")
            }
            Failure::Damaged(problem) => format!(
                "{file} arrived damaged and was not kept: it {problem}; run it again, and if that \
                 does not help, check HF_ENDPOINT and proxies"
            ),
            Failure::NoHub(problem) => format!(
                "{file} could not be fetched: what answers is no hub; check HF_ENDPOINT and proxies \
                 ({problem})"
            ),
            Failure::Refused(problem) => format!(
                "{file} was not fetched: the hub answers with {problem}; nothing was written, check \
                 HF_ENDPOINT and proxies"
            ),
            Failure::Cache(path, problem) => {
                format!("{file} cannot be kept in the cache: {}: {problem}", path.display())
            }
        })
    }

    fn problem(&self, problem: String) -> Error {
        let revision = self.revision.as_deref().unwrap_or(MAIN);
        Error::Hub { model: format!("{}@{revision}", self.id), problem }
    }
}

/// The folder of a file in the cache is named after its commit.
fn commit_of(path: &Path) -> Option<&str> {
    let folder = path.parent()?.file_name()?.to_str()?;
    client::is_commit(folder).then_some(folder)
}

/// Whether a part of an id, a revision or a file's path is a plain name: it becomes part of a path.
fn is_name(part: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty() && !part.starts_with('.') && part.chars().all(is_plain)
}
