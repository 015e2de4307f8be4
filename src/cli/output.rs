//! What commands print: tables and documents on standard output, talk on standard error.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde_json::Value;

use crate::protocol::{Bytes, Code, Failure};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Says no more than errors from now on.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// A message as it may go to a terminal: names in it come from anywhere, and no byte of them is to move the cursor.
pub fn one_line(message: &str) -> String {
    message.replace(char::is_control, " ")
}

/// A message without the middle of what was said at great length.
pub fn elided(message: String) -> String {
    const END: usize = 500;
    let all = message.chars().count();
    if all <= 2 * END {
        return message;
    }
    let (head, tail) = (message.chars().take(END), message.chars().skip(all - END));
    head.chain(" ... ".chars()).chain(tail).collect()
}

/// What the system answered, in words and without its number.
pub fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file or folder".into(),
        io::ErrorKind::PermissionDenied => "it is not open to you".into(),
        io::ErrorKind::IsADirectory => "it is a folder".into(),
        io::ErrorKind::NotADirectory => "the path goes through what is no folder".into(),
        _ => {
            let text = error.to_string();
            match text.rsplit_once(" (os error ") {
                Some((words, _)) => words.to_lowercase(),
                None => text,
            }
        }
    }
}

/// Says something that is no failure, in one line.
pub fn warn(message: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("forkvol: warning: {}", one_line(message));
    }
}

/// Says what goes on.
pub fn note(message: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("forkvol: {}", one_line(message));
    }
}

/// A bar of bytes on standard error, where that is a terminal. Without a total it only counts.
pub fn progress(total: Option<u64>) -> ProgressBar {
    if QUIET.load(Ordering::Relaxed) {
        return ProgressBar::hidden();
    }
    let (bar, form) = match total {
        Some(total) => (
            ProgressBar::new(total),
            "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        ),
        None => (
            ProgressBar::no_length(),
            "{spinner} {bytes} {bytes_per_sec}",
        ),
    };
    bar.with_style(ProgressStyle::with_template(form).expect("the forms are right"))
        .with_finish(ProgressFinish::AndClear)
}

/// Prints bytes to standard output.
pub fn print(text: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text)
        .and_then(|()| out.flush())
        .map_err(|e| cannot_print(&e))
}

pub fn cannot_print(error: &io::Error) -> Failure {
    Failure::new(
        Code::Failed,
        format!("cannot write to standard output: {error}"),
    )
}

/// A path as documents have it.
pub fn path(path: &Path) -> Bytes {
    Bytes(path.as_os_str().as_bytes().to_vec())
}

/// Prints a document as one line of JSON.
pub fn print_json(document: &Value) -> Result<(), Failure> {
    print(format!("{document}\n").as_bytes())
}

/// Prints the document, or what `text` makes of it.
pub fn show(
    json: bool,
    document: &Value,
    text: impl FnOnce(&Value) -> String,
) -> Result<(), Failure> {
    if json {
        print_json(document)
    } else {
        print(text(document).as_bytes())
    }
}

/// How a column shows a value.
#[derive(Clone, Copy, Debug)]
pub enum Shown {
    Plain,
    Size,
    Time,
    Seconds,
    /// Key=value pairs.
    Pairs,
}

/// A column: its heading, the JSON pointer of its value, and how that is shown.
pub type Column = (&'static str, &'static str, Shown);

/// Lays rows out under headings. No rows, no headings.
pub fn table(rows: &[Value], columns: &[Column]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let heading = columns.iter().map(|c| c.0.to_owned()).collect();
    let cell = |row: &Value, (_, pointer, shown): &Column| {
        shown.text(row.pointer(pointer).unwrap_or(&Value::Null))
    };
    let lines = rows
        .iter()
        .map(|row| columns.iter().map(|c| cell(row, c)).collect());
    let lines: Vec<Vec<String>> = std::iter::once(heading).chain(lines).collect();
    let widths: Vec<usize> = (0..columns.len())
        .map(|at| {
            lines
                .iter()
                .map(|line| line[at].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for line in lines {
        let mut text = String::new();
        for ((cell, width), (_, _, shown)) in line.iter().zip(&widths).zip(columns) {
            // A format takes no width beyond that of a u16.
            let padding = " ".repeat(width - cell.chars().count());
            match shown {
                Shown::Size => text.extend([&padding, cell.as_str(), "  "]),
                _ => text.extend([cell, padding.as_str(), "  "]),
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// One `name: value` line for each column.
pub fn fields(row: &Value, columns: &[Column]) -> String {
    let width = columns.iter().map(|c| c.0.len()).max().unwrap_or(0) + 1;
    columns
        .iter()
        .map(|(name, pointer, shown)| {
            let text = shown.text(row.pointer(pointer).unwrap_or(&Value::Null));
            format!("{:width$} {text}\n", format!("{name}:"))
        })
        .collect()
}

impl Shown {
    fn text(self, value: &Value) -> String {
        match (self, value) {
            (_, Value::Null) => "-".into(),
            (Shown::Size, Value::Number(n)) => n.as_u64().map_or_else(|| n.to_string(), size),
            (Shown::Seconds, Value::Number(n)) => seconds(n.as_f64().unwrap_or(0.0)),
            (Shown::Time, Value::String(time)) => time
                .get(..19)
                .map_or_else(|| time.clone(), |t| format!("{t}Z")),
            (Shown::Pairs, Value::Object(pairs)) => pairs
                .iter()
                .map(|(k, v)| format!("{k}={}", Shown::Plain.text(v)))
                .collect::<Vec<_>>()
                .join(" "),
            (_, Value::String(text)) => text.escape_default_controls(),
            (_, Value::Object(_)) => match serde_json::from_value::<Bytes>(value.clone()) {
                Ok(bytes) => String::from_utf8_lossy(&bytes.0).escape_default_controls(),
                Err(_) => value.to_string(),
            },
            (_, value) => value.to_string(),
        }
    }
}

/// Names come from anywhere; a terminal obeys control characters.
trait EscapeControls {
    fn escape_default_controls(&self) -> String;
}

impl<T: AsRef<str> + ?Sized> EscapeControls for T {
    fn escape_default_controls(&self) -> String {
        let text = self.as_ref();
        if !text.contains(char::is_control) {
            return text.to_owned();
        }
        text.chars()
            .flat_map(|c| {
                if c.is_control() {
                    c.escape_default().collect::<Vec<_>>()
                } else {
                    vec![c]
                }
            })
            .collect()
    }
}

/// A byte string of a document, for a terminal.
pub fn path_text(value: &Value) -> String {
    Shown::Plain.text(value)
}

/// A number of bytes for people.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" {
                format!("{bytes} B")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A time span for people.
pub fn seconds(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d{:02}h", whole / 86400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_lines_up() {
        let rows = [
            json!({"name": "npm", "size": 2048}),
            json!({"name": "cargo/x", "size": null}),
        ];
        let columns: [Column; 2] = [
            ("NAME", "/name", Shown::Plain),
            ("SIZE", "/size", Shown::Size),
        ];
        assert_eq!(
            table(&rows, &columns),
            "NAME        SIZE\nnpm      2.0 KiB\ncargo/x        -\n"
        );
        assert_eq!(table(&[], &columns), "");
        let long = "x".repeat(70_000);
        assert!(table(&[json!({"name": long})], &columns).contains(&long));
    }

    #[test]
    fn what_the_system_answered_is_said_in_words() {
        for (number, words) in [
            (2, "there is no such file or folder"),
            (13, "it is not open to you"),
            (21, "it is a folder"),
            (28, "no space left on device"),
        ] {
            assert_eq!(reason(&io::Error::from_raw_os_error(number)), words);
        }
        assert_eq!(reason(&io::Error::other("Own words")), "Own words");
    }

    #[test]
    fn values_are_for_people_and_terminals() {
        assert_eq!(Shown::Plain.text(&json!("a\u{1b}[31m")), "a\\u{1b}[31m");
        assert_eq!(Shown::Plain.text(&json!({"b64": "/w=="})), "\u{fffd}");
        assert_eq!(
            Shown::Time.text(&json!("2026-01-02T03:04:05.678Z")),
            "2026-01-02T03:04:05Z"
        );
        assert_eq!(Shown::Seconds.text(&json!(3725.4)), "1h02m");
        assert_eq!(Shown::Pairs.text(&json!({"os": "x", "n": 1})), "n=1 os=x");
        assert_eq!(size(1 << 40), "1.0 TiB");
        assert_eq!(size(1023), "1023 B");
    }
}
