//! Contenders one at a time, for a driver that takes turns with other programs.

use crate::contenders::{self, Contender, Inputs};
use crate::{Shape, parse_shape};
use anyhow::{Context, Error, Result, bail};
use benches::machine::Machine;
use benches::serve::{calls, commands, read, words, write};
use benches::turns::seconds;
use serde_json::{Value, json};

const COMMANDS: &str = "\
about -> the machine; \
run decode CONTENDER H,H_kv,N,D CALLS -> the seconds of each call, on random inputs; \
compute decode CONTENDER FOLDER -> reads q.npy, k.npy and v.npy (f32), writes CONTENDER.npy; \
release -> frees the caches of the last run. \
CONTENDER is ours, ours-bf16, ours-int8 or candle";

/// Answers until there are no more commands.
pub fn run(queries: usize, machine: &Machine) -> Result<()> {
    let mut ready: Option<(Shape, Vec<Contender>)> = None;
    commands(|line| match words(line)[..] {
        ["about"] => Ok(json!({ "machine": machine })),
        ["run", "decode", contender, shape, count] => {
            let (shape, count) = (parse_shape(shape).map_err(Error::msg)?, calls(count)?);
            if ready.as_ref().is_none_or(|ready| ready.0 != shape) {
                ready = None;
                ready = Some((shape, contenders::all(&Inputs::random(shape, queries)?)?));
            }
            let (_, contenders) = ready.as_mut().expect("just made");
            let contender = find(contenders, contender)?;
            let call = |_| seconds(|| (contender.run)().map(drop));
            let seconds: Vec<f64> = (0..count).map(call).collect::<candle_core::Result<_>>()?;
            Ok(json!({ "seconds": seconds }))
        }
        ["compute", "decode", contender, folder] => compute(contender, folder),
        ["release"] => {
            ready = None;
            Ok(json!({ "released": true }))
        }
        ["help"] => Ok(json!({ "help": COMMANDS })),
        _ => bail!("{line:?} is no command. {COMMANDS}"),
    })
}

fn compute(contender: &str, folder: &str) -> Result<Value> {
    let inputs = Inputs { q: read(folder, "q")?, k: read(folder, "k")?, v: read(folder, "v")? };
    let mut contenders = contenders::all(&inputs)?;
    let contender = find(&mut contenders, contender)?;
    let output = (contender.run)()?;
    // Candle's result is [B, H, M, D] too.
    Ok(json!({ "written": write(folder, contender.id, &output)? }))
}

fn find<'a>(contenders: &'a mut [Contender], id: &str) -> Result<&'a mut Contender> {
    let ids: Vec<_> = contenders.iter().map(|contender| contender.id).collect();
    let found = contenders.iter_mut().find(|contender| contender.id == id);
    found.with_context(|| format!("{id:?}, expected one of {}", ids.join(", ")))
}
