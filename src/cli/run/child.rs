//! The command of `run`: started, watched, and told of signals.

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::super::ending::End;
use super::super::exit;
use crate::protocol::{Code, Failure};
use crate::sys::namespace;
use crate::sys::process::{self, Signals};

/// Signals that end a job; a run that gets one is cancelled and commits nothing.
const CANCEL: [i32; 4] = [
    process::SIGHUP,
    process::SIGINT,
    process::SIGQUIT,
    process::SIGTERM,
];
/// Signals that are the command's own affair.
const PASS_ON: [i32; 3] = [process::SIGUSR1, process::SIGUSR2, process::SIGWINCH];

/// Blocks the signals that are to be read, so that none is lost before the command is there.
pub fn watch_signals() -> io::Result<Signals> {
    let all: Vec<i32> = CANCEL.into_iter().chain(PASS_ON).collect();
    Signals::block(&all)
}

/// Returns a cancelling signal that has come already.
pub fn cancelled(signals: &Signals) -> io::Result<Option<i32>> {
    while let Some(signal) = signals.next(Some(Duration::ZERO))? {
        if CANCEL.contains(&signal.number) {
            return Ok(Some(signal.number));
        }
    }
    Ok(None)
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// As a shell has it.
    pub status: u8,
    pub signal: Option<i32>,
    pub cancelled: bool,
}

impl Outcome {
    fn new(status: ExitStatus, cancelled: bool) -> Outcome {
        let signal = status.signal();
        let code = status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0));
        Outcome {
            status: u8::try_from(code).unwrap_or(u8::MAX),
            signal,
            cancelled,
        }
    }

    pub fn end(&self, successes: &[i32]) -> End {
        if self.cancelled {
            End::Cancelled
        } else {
            End::of_status(self.status.into(), successes)
        }
    }
}

/// Why the command did not run, with the status that tells.
#[derive(Debug)]
pub struct NotRun {
    pub failure: Failure,
    pub status: u8,
}

/// Runs the command to its end. `binds` are made in a namespace of its own.
pub fn supervise(
    words: &[OsString],
    variables: &[(String, PathBuf)],
    binds: Option<Vec<(PathBuf, PathBuf)>>,
    signals: &Signals,
) -> Result<Outcome, NotRun> {
    let (program, arguments) = words.split_first().ok_or_else(|| NotRun {
        failure: Failure::new(Code::Usage, "there is no command to run"),
        status: exit::RUN_FAILED,
    })?;
    let mut command = Command::new(program);
    command.args(arguments);
    command.envs(variables.iter().map(|(k, v)| (k, v)));
    if let Some(binds) = binds {
        namespace::enter_in_child(&mut command, binds);
    }
    let mut child = process::with_clean_mask(&mut command)
        .spawn()
        .map_err(|error| {
            let status = match error.kind() {
                io::ErrorKind::NotFound => exit::NOT_FOUND,
                _ => exit::NOT_EXECUTABLE,
            };
            let message = format!("cannot run {}: {error}", program.display());
            NotRun {
                failure: Failure::new(Code::Failed, message),
                status,
            }
        })?;
    let lost = |error: io::Error| NotRun {
        failure: Failure::new(
            Code::Failed,
            format!("cannot watch {}: {error}", program.display()),
        ),
        status: exit::RUN_FAILED,
    };
    let end = process::end_of(&child).map_err(lost)?;
    let mut cancelled = false;
    loop {
        let ready = process::wait_readable(&[end.as_fd(), signals.as_fd()], None).map_err(lost)?;
        if ready.contains(&0) {
            let status = child.wait().map_err(lost)?;
            return Ok(Outcome::new(status, cancelled));
        }
        let Some(signal) = signals.next(Some(Duration::ZERO)).map_err(lost)? else {
            continue;
        };
        cancelled |= CANCEL.contains(&signal.number);
        // What the terminal sends has reached the command already, which is in the same process group.
        if !signal.from_kernel {
            process::kill(child.id(), signal.number).map_err(lost)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<Outcome, NotRun> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        std::thread::spawn(move || supervise(&words, &[], None, &watch_signals().unwrap()))
            .join()
            .unwrap()
    }

    #[test]
    fn a_status_is_passed_on() {
        for (script, status, signal) in [
            ("exit 0", 0, None),
            ("exit 7", 7, None),
            ("kill -9 $$", 137, Some(9)),
        ] {
            let outcome = run(&["sh", "-c", script]).unwrap();
            assert_eq!(
                outcome,
                Outcome {
                    status,
                    signal,
                    cancelled: false
                },
                "{script}"
            );
        }
    }

    #[test]
    fn a_signal_cancels_and_reaches_the_command() {
        let outcome = std::thread::spawn(|| {
            let signals = watch_signals().unwrap();
            process::raise_in_thread(process::SIGTERM);
            supervise(&["sleep".into(), "60".into()], &[], None, &signals).unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(
            outcome,
            Outcome {
                status: 143,
                signal: Some(15),
                cancelled: true
            }
        );
    }

    #[test]
    fn what_cannot_run_has_a_status_of_its_own() {
        assert_eq!(
            run(&["/no/such/program"]).unwrap_err().status,
            exit::NOT_FOUND
        );
        assert_eq!(
            run(&["/etc/passwd"]).unwrap_err().status,
            exit::NOT_EXECUTABLE
        );
    }
}
