"""What snap does, one module a job: a request in, a result out; nothing prints or exits here."""
