//! A prompt as the model's chat template writes it.

use super::memory::within;
use anyhow::{Context, Result, anyhow};
use candle_int8_attention::models::llama::LlamaTokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

/// Instructions of a template: those of long chats take some thousands, and one that loops without
/// end is stopped within seconds.
const FUEL: u64 = 10_000_000;

/// Bytes that a template may take: those of long chats take some kB.
const MEMORY: usize = 256 << 20;

/// The text of a chat in which it is the model's turn to answer `user`.
pub fn render(tokenizer: &LlamaTokenizer, system: Option<&str>, user: &str) -> Result<String> {
    let template = tokenizer.chat_template().ok_or_else(|| {
        anyhow!("the model has no chat template; it continues text without --chat")
    })?;
    let message = |role: &str, content: &str| context! { role => role, content => content };
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(system.map(|text| message("system", text)));
    messages.push(message("user", user));
    let environment = environment()?;
    let rendered = within(MEMORY, || {
        environment.render_str(
            template,
            context! {
                messages => messages,
                add_generation_prompt => true,
                bos_token => tokenizer.bos_token().unwrap_or_default(),
                eos_token => tokenizer.eos_token().unwrap_or_default(),
            },
        )
    });
    rendered.context("the model's chat template cannot be used")
}

/// Jinja as Hugging Face's templates expect it: Python's methods of strings, no newline after a
/// block, and a function with which a template refuses messages.
fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function(
        "raise_exception",
        |message: String| -> Result<(), minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    Ok(environment)
}
