//! The shape of the source: what ARCHITECTURE.md says of it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// The checkout that is tested, as cargo says when it runs this: what it said when it built this may have been another one, where
/// several share a target folder.
fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .expect("cargo runs the tests")
        .into()
}

/// All files of a folder with this ending, with what they hold.
fn files(folder: &str, ending: &str) -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join(folder)];
    let mut out = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == ending) {
                let text = fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    assert!(!out.is_empty(), "there is nothing in {folder}");
    out
}

/// The module at the top under which a file of `src` lies.
fn module(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str();
    first.to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The modules of the code map, from the top.
fn code_map() -> Vec<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, map) = text.split_once("## Code map").unwrap();
    let rows = map.lines().filter(|line| line.starts_with("| `"));
    rows.take_while(|row| !row.starts_with("##"))
        .flat_map(|row| row.split('|').nth(1).unwrap().split(','))
        .map(|name| name.trim().trim_matches('`').to_owned())
        .collect()
}

#[test]
fn imports_go_down_the_code_map_only() {
    let map = code_map();
    let place = |name: &str| {
        let found = map.iter().position(|known| known == name);
        found.unwrap_or_else(|| panic!("{name} is not in the code map"))
    };
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        let own = module(&path);
        if own == "lib" {
            continue;
        }
        for (_, rest) in text
            .match_indices("crate::")
            .map(|(at, word)| (at, &text[at + word.len()..]))
        {
            let name: String = rest
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect();
            if map.contains(&name) && place(&name) < place(&own) {
                wrong.push(format!("{} imports {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_dependency_that_has_a_home_is_used_there_alone() {
    let homes = [
        ("rocksdb", "store"),
        ("fuser", "mount"),
        ("libc", "sys"),
        ("clap", "cli"),
        ("indicatif", "cli"),
        ("saphyr_parser", "cli"),
        ("ignore", "volume"),
    ];
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        for (name, home) in homes {
            let used =
                text.contains(&format!("use {name}::")) || text.contains(&format!(" {name}::"));
            if used && module(&path) != home {
                wrong.push(format!("{} uses {name}", path.display()));
            }
        }
        let unsafe_code = text.contains("unsafe {") || text.contains("unsafe fn");
        if unsafe_code && module(&path) != "sys" {
            wrong.push(format!("{} has unsafe code", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut documents = files("docs", "md");
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let path = root().join(name);
        let text = fs::read_to_string(&path).unwrap();
        documents.push((path, text));
    }
    for (path, text) in documents {
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let there = path.parent().unwrap().join(target).exists();
            assert!(there, "{}: {link}", path.display());
        }
    }
}

/// What a document says, cut into claims: the sentences of its paragraphs and bullets, and the rows of its tables. Headings, code
/// and the heads of tables say nothing, and what stands before the first section only introduces. A sentence ends at a full stop
/// before a space and a capital letter, or before code.
fn claims(text: &str) -> Vec<String> {
    let (mut out, mut paragraph) = (Vec::new(), String::new());
    let mut is_code = false;
    let mut lines = text.lines().chain([""]).peekable();
    while let Some(line) = lines.next() {
        let is_fence = line.starts_with("```");
        let new = is_fence || is_code || line.is_empty() || line.starts_with(['#', '|']);
        if new || line.starts_with("- ") {
            out.extend(sentences(&std::mem::take(&mut paragraph)));
        }
        is_code ^= is_fence;
        if !new {
            paragraph += line.strip_prefix("- ").unwrap_or(line).trim();
            paragraph.push(' ');
        }
        let is_head = lines.peek().is_some_and(|next| next.starts_with("|--"));
        if !is_code && line.starts_with('|') && !line.starts_with("|--") && !is_head {
            out.push(line.to_owned());
        }
    }
    out
}

fn sentences(paragraph: &str) -> Vec<String> {
    let (mut out, mut rest, mut from) = (Vec::new(), paragraph.trim(), 0);
    while let Some(at) = rest[from..].find(". ").map(|at| from + at + 1) {
        let is_code = rest[..at].matches('`').count() % 2 == 1;
        let next = rest[at + 1..].chars().next();
        if !is_code && next.is_some_and(|c| c.is_uppercase() || c == '`') {
            out.push(rest[..at].to_owned());
            (rest, from) = (&rest[at + 1..], 0);
        } else {
            from = at;
        }
    }
    out.extend((!rest.is_empty()).then(|| rest.to_owned()));
    out
}

/// What the comments of a file quote, and the line that follows the comment.
fn quotes(text: &str, comment: &str) -> Vec<(String, String)> {
    let (mut out, mut quote) = (Vec::new(), String::new());
    for line in text.lines().map(str::trim_start) {
        if let Some(quoted) = line.strip_prefix(&format!("{comment} > ")) {
            quote += quoted;
            quote.push('\n');
        } else if !line.starts_with(comment) && !quote.is_empty() {
            out.push((std::mem::take(&mut quote), line.to_owned()));
        }
    }
    out
}

/// Each claim of the manual on semantics is quoted, word by word, by the test that shows it, in its doc comment: so a claim that
/// nothing shows is found, and so is a quote that the manual does not say any more. Where a suite from outside shows it, a comment
/// above the function of its script in tests/conformance quotes it.
#[test]
fn every_claim_of_the_manual_is_quoted_by_a_test() {
    let manual = fs::read_to_string(root().join("docs/semantics.md")).unwrap();
    let (_, said) = manual.split_once("\n## ").unwrap();
    let said = claims(&format!("## {said}"));
    let mut wrong = Vec::new();
    let mut quoted = Vec::new();
    let sources = [
        ("src", "rs", "///"),
        ("tests", "rs", "///"),
        ("tests/conformance", "sh", "#"),
    ];
    for (folder, ending, comment) in sources {
        for (path, text) in files(folder, ending) {
            for (quote, next) in quotes(&text, comment) {
                if next != "#[test]" && !next.ends_with("() {") {
                    wrong.push(format!("{}: no test is below: {quote}", path.display()));
                }
                for claim in claims(&quote) {
                    if !said.contains(&claim) {
                        wrong.push(format!(
                            "{}: the manual does not say: {claim}",
                            path.display()
                        ));
                    }
                    quoted.push(claim);
                }
            }
        }
    }
    let unshown = said.iter().filter(|claim| !quoted.contains(claim));
    wrong.extend(unshown.map(|claim| format!("no test quotes: {claim}")));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn documents_are_cut_into_sentences_and_rows() {
    let text = "## Head\n\nOne is `a. B` e.g. so. Two,\nin two lines. `c` is three.\n\n- Four: 1. no.\n  Five!\n- Six\n\n\
                | a | b |\n|---|---|\n| c | d |\n| e | f |\n\n```toml\nno = 1\n| no |\n```\nSeven.\n";
    let expected = [
        "One is `a. B` e.g. so.",
        "Two, in two lines.",
        "`c` is three.",
        "Four: 1. no.",
        "Five!",
        "Six",
        "| c | d |",
        "| e | f |",
        "Seven.",
    ];
    assert_eq!(claims(text), expected);
}
