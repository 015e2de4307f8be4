//! Raw content over a connection, as a writer and as a reader; used by both sides.

use std::io::{self, Read, Write};
use std::time::Duration;

use super::{Connection, FrameError, MAX_CONTENT};

/// How long the other side may take for one frame.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Small writes are gathered up to this.
const GATHER: usize = 256 << 10;

fn to_io(error: FrameError) -> io::Error {
    match error {
        FrameError::Io(error) => error,
        FrameError::Closed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}

/// Sends what is written to it as frames.
pub struct Outgoing<'a> {
    connection: &'a mut Connection,
    gathered: Vec<u8>,
}

impl<'a> Outgoing<'a> {
    pub fn new(connection: &'a mut Connection) -> Outgoing<'a> {
        Outgoing {
            connection,
            gathered: Vec::with_capacity(GATHER),
        }
    }

    /// Ends the row of frames.
    pub fn finish(mut self) -> Result<(), FrameError> {
        self.flush().map_err(FrameError::from)?;
        self.connection.send_content(&[])
    }
}

impl Write for Outgoing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.get(..MAX_CONTENT).unwrap_or(bytes);
        if self.gathered.len() + taken.len() > GATHER {
            self.flush()?;
        }
        if taken.len() >= GATHER {
            self.connection.send_content(taken).map_err(to_io)?;
        } else {
            self.gathered.extend_from_slice(taken);
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.gathered.is_empty() {
            self.connection
                .send_content(&self.gathered)
                .map_err(to_io)?;
            self.gathered.clear();
        }
        Ok(())
    }
}

/// Reads the frames of the other side until one without bytes.
pub struct Incoming<'a> {
    connection: &'a mut Connection,
    frame: Vec<u8>,
    read: usize,
    ended: bool,
}

impl<'a> Incoming<'a> {
    pub fn new(connection: &'a mut Connection) -> Incoming<'a> {
        Incoming {
            connection,
            frame: Vec::new(),
            read: 0,
            ended: false,
        }
    }

    /// Whether all frames have been read, so that the connection can go on.
    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

impl Read for Incoming<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.frame.len() && !self.ended {
            self.frame = self
                .connection
                .receive_content(MAX_CONTENT, Some(TIMEOUT))
                .map_err(to_io)?;
            self.read = 0;
            self.ended = self.frame.is_empty();
        }
        let rest = self.frame.get(self.read..).unwrap_or_default();
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        self.read += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn content_arrives_whole() {
        let (a, b) = UnixStream::pair().unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let sent = data.clone();
        let sender = std::thread::spawn(move || {
            let mut connection = Connection::new(a);
            let mut out = Outgoing::new(&mut connection);
            out.write_all(&sent[..10]).unwrap();
            out.write_all(&sent[10..2_000_000]).unwrap();
            out.write_all(&sent[2_000_000..]).unwrap();
            out.finish().unwrap();
        });
        let mut connection = Connection::new(b);
        let (mut incoming, mut got) = (Incoming::new(&mut connection), Vec::new());
        incoming.read_to_end(&mut got).unwrap();
        assert!(incoming.is_ended());
        sender.join().unwrap();
        assert!(got == data);
    }

    #[test]
    fn content_that_breaks_off_is_an_error_and_not_an_end() {
        let (a, b) = UnixStream::pair().unwrap();
        Connection::new(a).send_content(b"half").unwrap();
        let mut connection = Connection::new(b);
        let mut incoming = Incoming::new(&mut connection);
        assert!(incoming.read_to_end(&mut Vec::new()).is_err());
        assert!(!incoming.is_ended());
    }
}
