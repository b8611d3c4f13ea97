//! Imports go one way: a room of `src` imports from those to its right on the map in ARCHITECTURE.md only, and
//! no file from one that imports, itself or through others, from it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// `["quant", "rows"]` of `quant::rows`.
type Names = Vec<String>;

/// How far to the right the rooms of the map are.
fn places(map: &str) -> BTreeMap<&str, usize> {
    let steps = map.split("->").enumerate();
    steps.flat_map(|(place, rooms)| rooms.split(',').map(move |r| (r.trim(), place))).collect()
}

/// The files of a folder and of those in it, as modules, and their text.
fn modules(folder: &Path, above: &[String]) -> TestResult<BTreeMap<Names, String>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).ok_or("a name")?.to_string();
        let own = [above, std::slice::from_ref(&name)].concat();
        if path.is_dir() {
            all.extend(modules(&path, &own)?);
        } else {
            let is_folder = name == "mod" || name == "lib";
            all.insert(
                if is_folder { above.to_vec() } else { own },
                std::fs::read_to_string(path)?,
            );
        }
    }
    Ok(all)
}

/// Names, `::`, and single characters of the code of a file, without its comments and tests.
fn tokens(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let code =
        code.lines().filter_map(|line| line.split("//").next()).collect::<Vec<_>>().join(" ");
    let mut tokens: Vec<String> = Vec::new();
    let mut before = ' ';
    for c in code.chars() {
        let of_name = |c: char| c.is_alphanumeric() || c == '_';
        match tokens.last_mut() {
            Some(last) if of_name(before) && of_name(c) || before == ':' && c == ':' => {
                last.push(c)
            }
            _ if c == ' ' => {}
            _ => tokens.push(c.to_string()),
        }
        before = c;
    }
    tokens
}

/// The paths that follow `before`, one for each leaf of what braces hold, and what stands behind them.
fn leaves<'a>(mut rest: &'a [String], before: &[String]) -> (Vec<Names>, &'a [String]) {
    let mut path = before.to_vec();
    while let [first, next @ ..] = rest {
        if first == "{" {
            let mut all = Vec::new();
            rest = next;
            while rest.first().is_some_and(|token| token != "}") {
                let (more, behind) = leaves(rest, &path);
                all.extend(more);
                // A comma, or what an alias is written with.
                let end = behind.iter().position(|token| token == "," || token == "}");
                rest = &behind[end.unwrap_or(behind.len())..];
                rest = rest.strip_prefix(&[",".to_string()]).unwrap_or(rest);
            }
            return (all, rest.get(1..).unwrap_or_default());
        }
        path.push(first.clone());
        match next {
            [colons, next @ ..] if colons == "::" => rest = next,
            _ => return (vec![path], next),
        }
    }
    (vec![path], rest)
}

/// All paths of a module's text that begin at the crate, at itself, at the module above or at one in it, from the
/// crate's root on.
fn paths(module: &[String], text: &str, is_module: impl Fn(&[String]) -> bool) -> Vec<Names> {
    let tokens = tokens(text);
    let mut all = Vec::new();
    for at in 0..tokens.len().saturating_sub(1) {
        let is_start = tokens[at + 1] == "::" && (at == 0 || tokens[at - 1] != "::");
        if !is_start || (at > 0 && tokens[at - 1] == "in") {
            continue; // `pub(in crate::a)` is no import.
        }
        let (mut from, mut rest) = (module.to_vec(), &tokens[at..]);
        let child = [module, &tokens[at..at + 1]].concat();
        match tokens[at].as_str() {
            "crate" => (from, rest) = (Vec::new(), &rest[2..]),
            "self" => rest = &rest[2..],
            "super" => {
                while let ["super", "::"] = [rest[0].as_str(), rest[1].as_str()] {
                    from.pop();
                    rest = &rest[2..];
                }
            }
            _ if is_module(&child) => {}
            _ => continue,
        }
        all.extend(leaves(rest, &from).0);
    }
    all
}

/// The file that a path leads to: that which defines its item, where files on the way only pass it on.
fn file(path: &[String], all: &BTreeMap<Names, Vec<Names>>) -> Names {
    let mut path = path.to_vec();
    loop {
        let known = (0..=path.len()).rev().find(|n| all.contains_key(&path[..*n])).unwrap_or(0);
        let (module, rest) = path.split_at(known);
        let passed =
            |to: &&Names| to.last() == rest.first() && to.starts_with(module) && **to != path;
        match all.get(module).into_iter().flatten().find(passed) {
            Some(to) if !rest.is_empty() => path = [to, &rest[1..]].concat(),
            _ => return module.to_vec(),
        }
    }
}

/// The paths of every file of `src`.
fn paths_of_source() -> TestResult<BTreeMap<Names, Vec<Names>>> {
    let texts = modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &[])?;
    let of = |(name, text): (&Names, &String)| {
        (name.clone(), paths(name, text, |module| texts.contains_key(module)))
    };
    Ok(texts.iter().map(of).collect())
}

#[test]
fn rooms_import_one_way() -> TestResult {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/ARCHITECTURE.md"))?;
    let map = text.lines().find(|line| line.contains("->") && line.contains("models"));
    let places = places(map.ok_or("no map")?);
    let mut rooms = BTreeSet::new();
    for (file, paths) in paths_of_source()? {
        let Some(room) = file.first() else { continue };
        let place = places.get(room.as_str()).ok_or(format!("{room} is not on the map"))?;
        rooms.insert(room.clone());
        for other in paths.iter().filter_map(|path| path.first()).filter(|other| *other != room) {
            // What is no room is of the crate's root: its error and its result.
            let Some(to) = places.get(other.as_str()) else { continue };
            assert!(to > place, "{} imports from {other}", file.join("::"));
        }
    }
    assert_eq!(rooms.len(), places.len(), "{rooms:?} of {places:?}");
    Ok(())
}

/// What each file imports from, without those that are in no circle and on no way between two.
fn circles(paths: &BTreeMap<Names, Vec<Names>>) -> BTreeMap<Names, BTreeSet<Names>> {
    let of = |(from, to): (&Names, &Vec<Names>)| {
        let files = to.iter().map(|path| file(path, paths)).filter(|to| to != from);
        (from.clone(), files.collect::<BTreeSet<_>>())
    };
    let mut left: BTreeMap<_, _> = paths.iter().map(of).collect();
    loop {
        let importing: BTreeSet<Names> = left.keys().cloned().collect();
        let imported: BTreeSet<Names> = left.values().flatten().cloned().collect();
        left.retain(|file, to| !to.is_disjoint(&importing) && imported.contains(file));
        if left.len() == importing.len() {
            left.values_mut().for_each(|to| to.retain(|to| importing.contains(to)));
            return left;
        }
    }
}

#[test]
fn no_files_import_from_each_other() -> TestResult {
    let line = |(file, to): (&Names, &BTreeSet<Names>)| {
        let to: Vec<String> = to.iter().map(|to| to.join("::")).collect();
        format!("{} imports from {}", file.join("::"), to.join(", "))
    };
    let lines: Vec<String> = circles(&paths_of_source()?).iter().map(line).collect();
    assert!(lines.is_empty(), "in circles:\n{}", lines.join("\n"));
    Ok(())
}

#[test]
fn paths_are_found_however_they_are_written() {
    let text = "//! crate::a\nuse crate::{\n    Error, b,\n    c::{D as X, E},\n    f,\n};\nuse super::m;\n\
                pub use child::{self, Y};\nlet x = crate::g::h(crate::i); std::z::w(other::v)\n";
    let module = ["p".to_string(), "q".to_string()];
    let found = paths(&module, text, |module| module == ["p", "q", "child"]);
    let found: Vec<String> = found.iter().map(|path| path.join(" ")).collect();
    let expected =
        "Error,b,c D,c E,f,p m,p q child self,p q child Y,g h,i".split(',').collect::<Vec<_>>();
    assert_eq!(found, expected);
    assert!(
        paths(&module, "#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n", |_| true).is_empty()
    );
}

#[test]
fn circles_are_found_through_what_is_passed_on() {
    let source = |passed_on: &str| {
        let texts = [
            (vec![], "pub use a::{b, X};"),
            (vec!["a"], passed_on),
            (vec!["a", "b"], "use super::c::Y;"),
            (vec!["a", "c"], "use crate::a::X;"),
        ];
        let names = |names: Vec<&str>| -> Names { names.into_iter().map(str::to_string).collect() };
        let texts = texts.map(|(name, text)| (names(name), text));
        let is_module = |module: &[String]| texts.iter().any(|(name, _)| name == module);
        texts.iter().map(|(name, text)| (name.clone(), paths(name, text, is_module))).collect()
    };
    let files = |passed_on| circles(&source(passed_on)).into_keys().map(|file| file.join("::"));
    assert_eq!(files("pub use b::X;").collect::<Vec<_>>(), ["a::b", "a::c"]);
    assert_eq!(files("struct X; pub use c::Y;").collect::<Vec<_>>(), ["a", "a::c"]);
    assert_eq!(files("struct X;").count(), 0);
}
