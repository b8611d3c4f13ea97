//! The map in ARCHITECTURE.md: a room of `src` imports from those to its right only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// How far to the right the rooms of the map are.
fn places(map: &str) -> BTreeMap<&str, usize> {
    let steps = map.split("->").enumerate();
    steps.flat_map(|(place, rooms)| rooms.split(',').map(move |r| (r.trim(), place))).collect()
}

/// All files of a folder, and of those in it.
fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { all.extend(files(&path)?) } else { all.push(path) }
    }
    Ok(all)
}

/// What follows `crate::` in the code of a file, without its tests: `a` of `crate::a::b`, `a` and `c` of
/// `crate::{a::b, c}`.
fn imports(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join(" ");
    code.split("crate::").skip(1).flat_map(first_names).collect()
}

/// The first name of a path, or of each path in braces.
fn first_names(path: &str) -> Vec<String> {
    let name = |path: &str| {
        let of_name = |c: &char| c.is_alphanumeric() || *c == '_';
        path.trim_start().chars().take_while(of_name).collect::<String>()
    };
    let Some(group) = path.strip_prefix('{') else { return vec![name(path)] };
    // Braces that are open after each character.
    let open = || {
        let mut open = 0;
        move |c: char| {
            open += i32::from(c == '{') - i32::from(c == '}');
            open
        }
    };
    let (mut to_end, mut between) = (open(), open());
    let end = group.find(|c| to_end(c) < 0).unwrap_or(group.len());
    group[..end].split(|c| between(c) == 0 && c == ',').map(name).collect()
}

#[test]
fn rooms_import_one_way() -> TestResult {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md"))?;
    let map = text.lines().find(|line| line.contains("->") && line.contains("models"));
    let places = places(map.ok_or("no map")?);
    let source = root.join("src");
    let mut rooms = 0;
    for entry in std::fs::read_dir(&source)? {
        let path = entry?.path();
        let room = path.file_stem().and_then(|name| name.to_str()).ok_or("a name")?;
        if room == "lib" {
            continue;
        }
        rooms += 1;
        let place = places.get(room).ok_or(format!("{room} is not on the map"))?;
        let files = if path.is_dir() { files(&path)? } else { vec![path.clone()] };
        for file in files {
            let text = std::fs::read_to_string(&file)?;
            for other in imports(&text).into_iter().filter(|other| other != room) {
                // What is no room is of the crate's root: its error and its result.
                let Some(to) = places.get(other.as_str()) else { continue };
                assert!(to > place, "{} imports from {other}", file.display());
            }
        }
    }
    assert!(rooms >= places.len(), "{rooms} rooms of {places:?}");
    Ok(())
}

#[test]
fn imports_are_found_however_they_are_written() {
    let text = "//! crate::a\nuse crate::{\n    Error, b,\n    c::{D, E},\n    f,\n};\nlet x = crate::g::h(crate::i);\n";
    let found: Vec<String> = imports(text).into_iter().filter(|name| !name.is_empty()).collect();
    assert_eq!(found, ["Error", "b", "c", "f", "g", "i"]);
    assert!(imports("#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n").is_empty());
}
