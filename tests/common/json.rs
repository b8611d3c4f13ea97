//! Comparing JSON values.

use serde_json::Value;

/// Where two JSON values differ.
fn differences(a: &Value, b: &Value, path: &str, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) if a.len() == b.len() => {
            for (key, value) in a {
                let other = b.get(key).unwrap_or(&Value::Null);
                differences(value, other, &format!("{path}.{key}"), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differences(a, b, &format!("{path}[{i}]"), found);
            }
        }
        _ if a == b => {}
        _ => found.push(format!("{path}: {a} and {b}")),
    }
}

/// # Panics
/// With the first differences, if there are any.
pub fn assert_same(a: &Value, b: &Value) {
    let mut found = Vec::new();
    differences(a, b, "", &mut found);
    assert!(
        found.is_empty(),
        "{} differences, the first: {:#?}",
        found.len(),
        &found[..found.len().min(5)]
    );
}
